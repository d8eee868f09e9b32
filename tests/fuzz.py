#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Throw damaged pictures and points at the program, and see that it says one line, quickly, and leaves nothing behind.

Not part of the test suite. Pictures are mutated in their structure (tags, directories, cards, sizes, offsets) and in
their bytes. Stops at the first fault, whose files stay in the folder that it names.

usage: fuzz.py [--seconds N] [--seed N]
"""
import argparse
import collections
import contextlib
import gzip
import io
import json
import os
import struct
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import tifffile
from helpers import draw, scatter, words
from tiff_files import write_tiff

import rmgradient

HEIGHT, WIDTH = 90, 120
SLOW = 5.0  # seconds
DTYPES = 'u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8'.split()
INTERESTING = [0, 1, 2, 3, 7, 8, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]


class Fault(Exception):
    """What the program must not do."""


def number(rng):
    """Return a number that programs stumble over."""
    return int(rng.choice(INTERESTING)) if rng.random() < 0.7 else int(rng.integers(0, 2**32))


def tiff_by_structure(rng, path):
    """Write a TIFF of tags that are right but for a few."""
    dtype = np.dtype(rng.choice(['u1', 'u2', 'f4']))
    n = int(rng.choice([1, 3]))
    sky = draw(n_channels=n, dtype=dtype)[0].astype(dtype.newbyteorder('<'))
    rows = int(rng.choice([7, 45, 90]))
    strips = [sky[y:y + rows].tobytes() for y in range(0, HEIGHT, rows)]
    tags = {256: (4, [WIDTH]), 257: (4, [HEIGHT]), 258: (3, [dtype.itemsize * 8] * n), 259: (3, [1]),
            262: (3, [2 if n == 3 else 1]), 277: (3, [n]), 278: (4, [rows]),
            339: (3, [3 if dtype.kind == 'f' else 1] * n),
            270: (2, b'a description\0'), 34675: (7, bytes(300)), 282: (5, struct.pack('<2I', 300, 1)),
            34665: (13, {37121: (7, b'1234'), 34853: (13, {0: (1, b'\2\3\0\0')})}), 60000: (4, [1, 2, 3])}
    for _ in range(rng.integers(0, 4)):
        code = int(rng.choice(list(tags)))
        type_, value = tags[code]
        action = rng.integers(0, 5)
        if action == 0:
            del tags[code]
        elif action == 1 and isinstance(value, list):
            tags[code] = type_, [number(rng) % 2**16 if type_ == 3 else number(rng) for _ in value]
        elif action == 2 and isinstance(value, list):
            tags[code] = type_, (value * 50)[:int(rng.integers(0, 60))] or [0]
        elif action == 3:
            tags[int(rng.choice([254, 266, 284, 317, 320, 330, 338, 322, 323, 324, 325, 33629, 700]))] = (
                4, [number(rng)] * int(rng.integers(1, 4)))
        elif not isinstance(value, dict):
            tags[code] = int(rng.choice([1, 2, 7])), rng.bytes(int(rng.integers(1, 40)))
    write_tiff(path, tags, strips, bigtiff=bool(rng.integers(0, 2)), pages=[{254: (4, [1])}] * int(rng.integers(0, 3)))


def tiff_by_library(rng, path):
    """Write a TIFF of any layout and compression."""
    dtype, n = np.dtype(rng.choice(DTYPES)), int(rng.choice([1, 3, 4]))
    sky = draw(n_channels=n, dtype=dtype if dtype != 'f2' else np.float32)[0].astype(dtype)
    kinds = [{}, {'tile': (32, 48)}, {'rowsperstrip': 7}, {'rowsperstrip': 90}]
    compressions = [{}, {'compression': 'zlib'}, {'compression': 'lzw'}, {'compression': 'zlib', 'predictor': True}]
    planar = 'separate' if n > 1 and rng.random() < 0.3 else 'contig'
    if planar == 'separate':
        sky = np.moveaxis(sky, 2, 0)
    with contextlib.suppress(ValueError, NotImplementedError):
        tifffile.imwrite(path, sky, photometric='minisblack' if n == 1 else 'rgb', planarconfig=planar,
                         byteorder=str(rng.choice(['<', '>'])), bigtiff=bool(rng.integers(0, 2)),
                         extrasamples=['unassalpha'] if n == 4 else None, **kinds[rng.integers(0, 4)],
                         **compressions[rng.integers(0, 4)])


def fits_by_structure(rng, path):
    """Write a FITS picture of cards that are right but for a few."""
    bits = int(rng.choice([8, 16, 32, 64, -32, -64]))
    stored = np.dtype(f'>{"f" if bits < 0 else "u" if bits == 8 else "i"}{abs(bits) // 8}')
    n = int(rng.choice([1, 3]))
    data = np.moveaxis(draw(n_channels=n, dtype=stored.newbyteorder('='))[0], 2, 0).astype(stored).tobytes()
    cards = ['SIMPLE  =                    T', f'BITPIX  = {bits:20}', f'NAXIS   = {3:20}', f'NAXIS1  = {WIDTH:20}',
             f'NAXIS2  = {HEIGHT:20}', f'NAXIS3  = {n:20}', "OBJECT  = 'M 31'", 'BZERO   = 0', 'BSCALE  = 1.0',
             'BLANK   = 17', "LONGSTR = 'long &'", "CONTINUE  'string'", 'COMMENT text', 'HIERARCH ESO A B = 3']
    if bits < 0:
        cards.remove('BLANK   = 17')
    words_ = ['T', 'F', "'text'", '1E400', 'NaN', '-1', '0', '3', '1.5', str(2**63), '(1, 2)', '', "'"]
    for _ in range(rng.integers(0, 4)):
        i = int(rng.integers(1, len(cards)))
        action = rng.integers(0, 4)
        if action == 0:
            del cards[i]
        elif action == 1:
            cards[i] = cards[i][:10] + str(rng.choice([*words_, str(number(rng))]))
        elif action == 2:
            cards.insert(i, cards[int(rng.integers(0, len(cards)))])
        else:
            keyword = rng.choice(['ZIMAGE', 'GROUPS', 'PCOUNT', 'GCOUNT', 'XTENSION'])
            cards.insert(i, f'{keyword:8}= {rng.choice(words_)}')
    head = b''.join(card.encode().ljust(80)[:80] for card in [*cards, 'END'])
    head = head.ljust(-(-len(head) // 2880) * 2880)
    path.write_bytes(head + data + bytes(-len(data) % 2880))


def fits_packed(rng, path):
    """Write a FITS picture as gzip does, one in four of a size that it has not."""
    fits_by_structure(rng, path)
    path.write_bytes(gzip.compress(path.read_bytes(), 1))
    if rng.random() < 0.25:
        path.write_bytes(gzip.compress(b'SIMPLE  =                    T'.ljust(80) + bytes(10**7), 1))


def fits_with_coordinates(rng, path):
    """Write a FITS picture with coordinates in the sky that are right but for a few."""
    cards = ['SIMPLE  =                    T', 'BITPIX  =                   16', 'NAXIS   =                    2',
             f'NAXIS1  = {WIDTH:20}', f'NAXIS2  = {HEIGHT:20}', "CTYPE1  = 'RA---TAN'", "CTYPE2  = 'DEC--TAN'",
             'CRVAL1  = 83.0', 'CRVAL2  = -5.0', 'CRPIX1  = 60.0', 'CRPIX2  = 45.0', 'CD1_1   = -1E-3',
             'CD1_2   = 0.0', 'CD2_1   = 0.0', 'CD2_2   = 1E-3']
    for _ in range(rng.integers(0, 4)):
        i = int(rng.integers(5, len(cards)))
        words_ = ["'RA---SIN'", "'x'", '0.0', '1E300', '-1', "'DEC--AIT'", 'T', '1E-9']
        cards[i] = cards[i][:10] + str(rng.choice(words_))
    head = b''.join(card.encode().ljust(80) for card in [*cards, 'END'])
    data = draw(n_channels=1, dtype=np.int16)[0].astype('>i2').tobytes()
    path.write_bytes(head.ljust(-(-len(head) // 2880) * 2880) + data + bytes(-len(data) % 2880))


def damage(rng, path):
    """Change bytes of a file, cut it, or move pieces of it."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(0, 6)):
        if not data:
            return
        # The structure is at the beginning or at the end.
        near = int(rng.choice([8, 300, 1000, len(data)]))
        at = int(rng.integers(0, min(near, len(data))))
        at = at if rng.random() < 0.5 else len(data) - 1 - at
        action = rng.integers(0, 5)
        if action == 0:
            data[at:at + 1] = rng.bytes(1)
        elif action == 1:
            data[at:at + 4] = struct.pack('<I', number(rng))
        elif action == 2:
            del data[at:at + int(rng.integers(1, 20))]
        elif action == 3:
            data[at:at] = data[at:at + int(rng.integers(1, 20))]
        elif rng.random() < 0.1:
            del data[at:]
    path.write_bytes(data)


def points_file(rng, path):
    """Write points, most of them good, as people and programs do not."""
    lines = [f'{x} {y}' for x, y in scatter()]
    for _ in range(rng.integers(0, 3)):
        lines[int(rng.integers(0, len(lines)))] = str(rng.choice(
            ['', '#', '1', '1 2 3', 'x y', '-0 -0', '1e9 3', '999999999 1', '30.0 40', '\x00', '(30, 40)', '30,40',
             '- -', '\ufeff30 30', '٣٠ 30']))
    path.write_bytes('\n'.join(lines).encode() if rng.random() < 0.95 else rng.bytes(300))


def attack(rng, folder):
    """Make files, run the program on them, and return what came of it, a word."""
    makers = [tiff_by_structure, tiff_by_library, fits_by_structure, fits_packed, fits_with_coordinates]
    make = makers[rng.integers(0, len(makers))]
    name = 'in.tif' if make in makers[:2] else 'in.fits'
    make(rng, folder / name)
    if rng.random() < 0.7:
        damage(rng, folder / name)
    points_file(rng, folder / 'points')
    options = ['-q', '-i', name, '-o', name.replace('in', 'out')]
    options += [['-f', 'points'], ['-a', '-s', '3'], ['-p', *words(scatter())]][rng.integers(0, 3)]
    options += [[], ['--divide'], ['--stretch'], ['--dither'], ['-m', '0.1'], ['--sky', 'darkest'],
                ['-b', name.replace('in', 'bg')], ['--save-points', 'saved']][rng.integers(0, 8)]
    if rng.random() < 0.3:  # a mask or a reference of any kind
        other = makers[rng.integers(0, len(makers))]
        other(rng, folder / 'other')
        if rng.random() < 0.4:
            damage(rng, folder / 'other')
        options += ['--mask' if rng.random() < 0.5 else '--reference', 'other']
    if rng.random() < 0.3:
        options += ['--report', 'report']
    before, stderr, start = sorted(os.listdir()), io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(stderr), warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.simplefilter('ignore', rmgradient.RmgradientWarning)
        try:
            status = rmgradient.main([str(option) for option in options])
        except SystemExit as stop:  # --reference with -m
            status = stop.code
    seconds, said = time.monotonic() - start, stderr.getvalue()
    errors = [line for line in said.splitlines() if line.startswith('rmgradient: error: ')]
    if seconds > SLOW:
        raise Fault(f'{seconds:.1f} seconds: {options}')
    is_wrong_use = status == 2 and ('--reference' in options or '--mask' in options)
    if not said.replace('\n', '').isprintable() or len(errors) != status and not is_wrong_use:
        raise Fault(f'status {status}, and said {said!r}: {options}')
    if (folder / 'report').exists():
        json.loads((folder / 'report').read_text())
    if status and sorted(os.listdir()) != before:
        raise Fault(f'left behind {sorted(os.listdir())}: {options}')
    for path in folder.iterdir():
        path.unlink()
    return f'{name[3:]} {"refused" if status else "corrected"}'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seconds', type=float, default=600)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    end, counts = time.monotonic() + options.seconds, collections.Counter()
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    while time.monotonic() < end:
        seed = options.seed + counts.total()
        try:
            counts[attack(np.random.default_rng(seed), folder)] += 1
        except Exception:
            traceback.print_exc()
            raise SystemExit(f'seed {seed}, files in {folder}') from None
    folder.rmdir()
    print(f'{counts.total()} pictures: ' + ', '.join(f'{n} {what}' for what, n in sorted(counts.items())))


if __name__ == '__main__':
    main()
