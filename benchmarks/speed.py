#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure time and memory of rmgradient, compare it with a plain copy, and print a table (reStructuredText).

Each row has medians of several runs of whole processes. Each run alternates with a run of another command: a plain
copy, which is as durable (tifffile or astropy reads, writes and synchronizes); for a small picture, only the imports;
for a hundred pictures in one process, one process for each. "ratio" is the median of the ratios of such pairs.
"processor" is the processor time. For deflate, the last column is the time of the encoder alone, on all cores.

The program runs as pip installs it, from compiled bytecode. As a script, Python compiles it each time.

usage: speed.py [--runs N] [--folder DIR] [--quick | --gigapixel] [RMGRADIENT.py]
"""
import argparse
import contextlib
import os
import platform
import py_compile
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile

IMPORT = 'import numpy, tifffile, imagecodecs'
COPY = ("import os, numpy, tifffile; f = open('copy.tif', 'w+b'); "
        "tifffile.imwrite(f, tifffile.imread('{}')); f.flush(); os.fsync(f.fileno())")
COPY_FITS = ("import os; from astropy.io import fits; f = open('copy.fits', 'w+b'); "
             "fits.open('in.fits').writeto(f); f.flush(); os.fsync(f.fileno())")
ENCODE = """
import imagecodecs, tifffile, concurrent.futures
picture = tifffile.imread('{}')
def encode(y):
    return imagecodecs.deflate_encode(imagecodecs.delta_encode(picture[y:y + 100], axis=-2).tobytes(), 1)
with concurrent.futures.ThreadPoolExecutor(len(__import__('os').sched_getaffinity(0))) as pool:
    for data in pool.map(encode, range(0, len(picture), 100)):
        pass
"""


def run(command, folder):
    """Run a command; return seconds, processor seconds, and peak memory in MB (Linux), asked for often."""
    peak, before = 0, os.times()
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder)
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f'/proc/{process.pid}/status').read_text().splitlines()
            peak = int(next(line for line in status if line.startswith('VmHWM')).split()[1]) / 1024
        time.sleep(0.002)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f'{command}: {process.returncode}')
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, used, peak


def make_picture(path, width, height, rowsperstrip=100, **options):
    """Write a sky of a gradient and noise, strip by strip."""
    rng = np.random.default_rng(1)
    ramp = np.linspace(1000, 3000, width)[None, :, None] * [1.0, 0.8, 0.6]
    noise = rng.normal(0, 50, (257, width, 3))  # drawn once: its rows come again, with another level

    def strips():
        for y in range(0, height, rowsperstrip):
            rows = np.arange(y, min(y + rowsperstrip, height))
            strip = (ramp + noise[rows % 257] + 1500 * rows[:, None, None] / height).astype(np.uint16)
            if options.get('compression'):
                yield encode(strip, options['compression'])
            else:
                yield strip.tobytes()

    tifffile.imwrite(path, strips(), shape=(height, width, 3), dtype=np.uint16, photometric='rgb',
                     planarconfig='contig', rowsperstrip=rowsperstrip, metadata=None,
                     bigtiff=width * height * 6 > 2**32 - 2**26,
                     predictor=2 if options.get('compression') else None, **options)


def make_fits(path, width, height):
    """Write such a sky as FITS: three planes, 16 bit unsigned."""
    from astropy.io import fits
    header = fits.Header([('SIMPLE', True), ('BITPIX', 16), ('NAXIS', 3), ('NAXIS1', width), ('NAXIS2', height),
                          ('NAXIS3', 3), ('BZERO', 32768)])
    noise = np.random.default_rng(1).normal(0, 50, (257, width))
    with open(path, 'wb') as file:
        file.write(header.tostring().encode())
        for level in (1.0, 0.8, 0.6):
            for y in range(0, height, 100):
                rows = np.arange(y, min(y + 100, height))
                strip = level * np.linspace(1000, 3000, width) + noise[rows % 257] + 1500 * rows[:, None] / height
                file.write((strip - 32768).astype('>i2'))
        file.write(bytes(-width * height * 6 % 2880))


def encode(strip, compression):
    import imagecodecs
    data = imagecodecs.delta_encode(strip, axis=-2).tobytes()
    return imagecodecs.lzw_encode(data) if compression == 'lzw' else imagecodecs.deflate_encode(data, 1)


def draw_points(n, width, height):
    rng = np.random.default_rng(2)
    return np.unique(np.c_[rng.integers(24, width - 24, n), rng.integers(24, height - 24, n)], axis=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('script', nargs='?', default=Path(__file__).resolve().parent.parent / 'rmgradient.py')
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--folder', help='where to write the pictures (default: a temporary folder)')
    parser.add_argument('--quick', action='store_true', help='pictures a tenth as wide and high, to see that it runs')
    parser.add_argument('--gigapixel', action='store_true', help='also 32000 x 32000 pixels: 12 GB of files')
    options = parser.parse_args()
    cases = [  # name, width, height, points, options, how the input is written, rows of its strips
        ('uncompressed', 6000, 4000, 40, [], {}, 100),
        ('uncompressed', 6000, 4000, 500, [], {}, 100),
        ('classic', 6000, 4000, 40, ['-m', '0.1'], {}, 100),
        ('-a', 6000, 4000, 0, ['-a'], {}, 100),
        ('small', 600, 400, 40, [], {}, 100),
        ('uncompressed', 6000, 16000, 40, [], {}, 100),
        ('deflate out', 6000, 4000, 40, ['-c', '1'], {}, 100),
        ('deflate in', 6000, 4000, 40, [], {'compression': 'zlib'}, 16),
        ('LZW in', 6000, 4000, 40, [], {'compression': 'lzw'}, 16),
        ('one strip in', 6000, 4000, 40, [], {'compression': 'zlib'}, 4000),
        ('FITS', 6000, 4000, 40, [], None, 100),
        ('FITS', 6000, 16000, 40, [], None, 100),
    ]
    if options.quick:
        options.runs = 1
        cases = [(name, min(width, 600), min(height, 400), *rest) for name, width, height, *rest in cases]
    if options.gigapixel:
        cases.append(('uncompressed', 32000, 32000, 40, [], {}, 100))
    processor = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    print(f'{len(os.sched_getaffinity(0))} cores, {processor}; Python {platform.python_version()}, '
          f'numpy {np.__version__}, tifffile {tifffile.__version__}; medians of {options.runs} runs\n')
    rule = ' '.join('=' * n for n in (14, 13, 6, 8, 9, 8, 8, 9, 9))
    names = f"{'file':14} {'pixels':13} points {'time':8} processor {'memory':8} {'compared':8} ratio     encoder"
    print(rule, names, rule, sep='\n')
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        program = install(options.script, Path(folder, 'installed'))
        for name, width, height, n_points, arguments, writing, rows in cases:
            is_fits = writing is None
            if is_fits:
                make_fits(Path(folder, 'in.fits'), width, height)
            else:
                make_picture(Path(folder, 'in.tif'), width, height, rows, **writing)
            points = ['-p', *map(str, draw_points(n_points, width, height).ravel())] if n_points else []
            files = ['-i', 'in.fits', '-o', 'out.fits'] if is_fits else ['-i', 'in.tif', '-o', 'out.tif']
            command = [sys.executable, program, '-q', *files, *arguments, *points]
            large = width * height > 2e8  # tifffile would read it whole
            copy = IMPORT if name == 'small' else COPY_FITS if is_fits else COPY.format('in.tif')
            other = None if large else [sys.executable, '-c', copy]
            alone = statistics.median(run([sys.executable, '-c', ENCODE.format('in.tif')], folder)[0]
                                      for _ in range(options.runs)) if name == 'deflate out' else None
            print_row(name, f'{width} x {height}', n_points, command, other, 1 if large else options.runs, folder,
                      alone)
        hundred_pictures(program, options, folder)
    print(rule)


def print_row(name, pixels, n_points, command, other, n_runs, folder, encoder=None):
    """Run a command and another one in turn, and print a row of medians. The other one may be None."""
    ours, others = [], []
    for _ in range(n_runs):
        if other:
            others.append(run(other, folder))
        ours.append(run(command, folder))
        for path in Path(folder).glob('*.*'):
            if path.is_file() and path.stem in ('out', 'copy'):
                path.unlink()
    took, used, memory = (statistics.median(values) for values in zip(*ours))
    compared = statistics.median(seconds for seconds, *_ in others) if other else None
    ratio = statistics.median(our[0] / their[0] for our, their in zip(ours, others)) if other else None
    print(f'{name:14} {pixels:13} {n_points or "":<6} {f"{took:.2f} s":8} {f"{used:.2f} s":9} {f"{memory:.0f} MB":8} '
          f'{f"{compared:.2f} s" if other else "":8} {f"{ratio:.2f}" if other else "":9} '
          f'{f"{encoder:.2f} s" if encoder else ""}', flush=True)


def install(script, folder):
    """Compile a script as pip does, and return the path of a command that runs it."""
    folder.mkdir()
    shutil.copy(script, folder / 'rmgradient.py')
    py_compile.compile(folder / 'rmgradient.py')
    (folder / 'rmgradient').write_text('import sys\nfrom rmgradient import run\nsys.exit(run())\n')
    return str(folder / 'rmgradient')


def hundred_pictures(program, options, folder):
    """Print a row of many pictures in one process, compared with one process for each."""
    n = 10 if options.quick else 100
    for name in ('night', 'corrected'):
        Path(folder, name).mkdir()
    for i in range(n):
        make_picture(Path(folder, 'night', f'{i:03}.tif'), 1000, 800)
    Path(folder, 'points').write_text('\n'.join(f'{x} {y}' for x, y in draw_points(40, 1000, 800)))
    command = [sys.executable, program, '-q', '--overwrite', '-o', 'corrected', '-f', 'points', '-i']
    pictures = [str(path) for path in sorted(Path(folder, 'night').iterdir())]
    script = Path(folder, 'each.sh')
    script.write_text('\n'.join(shlex.join([*command, picture]) for picture in pictures))
    print_row(f'{n} pictures', '1000 x 800', 40, [*command, *pictures], ['sh', str(script)], min(options.runs, 3),
              folder)


if __name__ == '__main__':
    main()
