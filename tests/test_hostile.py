# SPDX-License-Identifier: Apache-2.0
"""Hostile files and inputs: what they declare is never believed beyond their size, and nothing of them gets out raw."""
import fractions
import io
import itertools
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from helpers import ROOT, correct, draw, posix, words
from numpy.testing import assert_array_equal
from tiff_files import HEIGHT, WIDTH, read_tags, write_tiff

import rmgradient as rg

GRAY = draw(n_channels=1)[0]
TAGS = {256: (4, [WIDTH]), 257: (4, [HEIGHT]), 258: (3, [16]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1]),
        278: (4, [HEIGHT])}
EXIF, GPS = 34665, 34853


# Runs the command line, and prints the peak of its memory in kB, which on Linux begins anew with each program.
MEASURED = '''
import sys
sys.path.insert(0, sys.argv.pop(1))
import rmgradient
status = rmgradient.main(sys.argv[1:])
if sys.platform.startswith('linux'):
    print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
sys.exit(status)
'''


def quickly(cli, seconds=5.0, megabytes=300):
    """Correct hostile.tif in a process of its own, with little memory and time; return status and messages."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, '-c', MEASURED, ROOT, '-i', 'hostile.tif', '-o', 'out.tif', '--overwrite',
                           '-p', *words(cli.points)], capture_output=True, text=True, cwd=cli.folder, timeout=60)
    assert time.monotonic() - start < 2 + seconds
    assert done.stdout == '' or int(done.stdout) < 1000 * megabytes
    assert 'Traceback' not in done.stderr
    return done.returncode, done.stderr


def patch(path, code, value):
    """Set the value, or the pointer to it, of an entry of the first directory."""
    data = bytearray(path.read_bytes())
    offset, = struct.unpack_from('<I', data, 4)
    n, = struct.unpack_from('<H', data, offset)
    for i in range(n):
        entry = offset + 2 + 12 * i
        if struct.unpack_from('<H', data, entry)[0] == code:
            struct.pack_into('<I', data, entry + 8, value)
    path.write_bytes(data)


def directory(*entries, following=0):
    """Return the bytes of a directory of (code, type, count, value)."""
    return struct.pack('<H', len(entries)) + b''.join(struct.pack('<HHII', *entry) for entry in entries) + struct.pack(
        '<I', following)


def test_directories_that_double(cli):
    """EXIF > GPS > EXIF, two of them in each: 2^100 ways through 3 KB."""
    path = cli.folder / 'hostile.tif'
    write_tiff(path, {**TAGS, EXIF: (4, [0])}, [GRAY.tobytes()])
    start = path.stat().st_size
    size = len(directory((EXIF, 4, 1, 0), (GPS, 4, 1, 0)))
    chain = b''.join(directory((EXIF, 4, 1, start + (i + 1) * size), (GPS, 4, 1, start + (i + 1) * size))
                     for i in range(100)) + directory()
    path.write_bytes(path.read_bytes() + chain)
    patch(path, EXIF, start)
    status, said = quickly(cli)
    assert status == 0
    assert 'EXIF cannot be read and is left out' in said
    assert 'GPS cannot be read and is left out' in said


def test_directory_deep_within_itself(cli):
    path = cli.folder / 'hostile.tif'
    write_tiff(path, {**TAGS, EXIF: (4, [0])}, [GRAY.tobytes()])
    start = path.stat().st_size
    size = len(directory((40965, 4, 1, 0)))
    chain = b''.join(directory((40965, 4, 1, start + (i + 1) * size)) for i in range(3000))
    path.write_bytes(path.read_bytes() + chain + directory())
    patch(path, EXIF, start)
    assert quickly(cli)[0] == 0
    inside = read_tags(cli.folder / 'out.tif')[EXIF]
    assert list(inside) == [40965]


def test_tags_that_share_their_bytes(cli):
    """Of 3000 tags that are 1 MB each, but the same, one is kept."""
    path = cli.folder / 'hostile.tif'
    tags = {code: (7, [0] * 5) for code in range(60000, 63000)}
    write_tiff(path, {**TAGS, **tags}, [GRAY.tobytes()])
    data = bytearray(path.read_bytes())
    start = len(data)
    offset, = struct.unpack_from('<I', data, 4)
    for i in range(struct.unpack_from('<H', data, offset)[0]):
        if struct.unpack_from('<H', data, offset + 2 + 12 * i)[0] >= 60000:
            struct.pack_into('<II', data, offset + 2 + 12 * i + 4, 10**6, start)
    path.write_bytes(data + bytes(10**6))
    status, said = quickly(cli)
    assert status == 0
    assert said.count('cannot be read and is left out') == 3
    assert 'hostile.tif: 2996 more tags cannot be read and are left out' in said
    assert (cli.folder / 'out.tif').stat().st_size < 2 * path.stat().st_size


def test_overlapping_further_directories(cli):
    """Each begins two bytes behind the one before, with 4000 entries that are those of the others."""
    path = cli.folder / 'hostile.tif'
    write_tiff(path, TAGS, [GRAY.tobytes()])
    data = bytearray(path.read_bytes())
    start = len(data)
    data += np.full(24000, 4000, '<u2').tobytes() * 2
    for i in range(2000):  # the next directory, behind the entries
        at = start + 24 * i + 2 + 12 * 4000
        if at + 4 <= len(data):
            struct.pack_into('<I', data, at, start + 24 * (i + 1))
    offset, = struct.unpack_from('<I', data, 4)
    struct.pack_into('<I', data, offset + 2 + 12 * struct.unpack_from('<H', data, offset)[0], start)
    path.write_bytes(data)
    status, said = quickly(cli)
    assert status == 0
    assert 'another page is damaged and left out' in said


def test_tag_that_claims_gigabytes(cli):
    path = cli.folder / 'hostile.tif'
    write_tiff(path, {**TAGS, 60000: (12, [1.0, 2.0])}, [GRAY.tobytes()])
    data = bytearray(path.read_bytes())
    at = data.find(struct.pack('<HHI', 60000, 12, 2))
    struct.pack_into('<I', data, at + 4, 2**32 - 1)
    path.write_bytes(data)
    status, said = quickly(cli)
    assert status == 0
    assert 'hostile.tif: tag 60000 cannot be read and is left out' in said


@pytest.mark.parametrize('code', [273, 282, 330, 338, 339, 258, 270, 50838])
def test_tags_given_again_and_again(cli, code):
    """2000 entries of one tag, each with the same 2 MB: tifffile would load them all."""
    path = cli.folder / 'hostile.tif'
    write_tiff(path, {**TAGS, **{60000 + i: (7, [0] * 5) for i in range(2000)}}, [GRAY.tobytes()])
    data = bytearray(path.read_bytes())
    start = len(data)
    offset, = struct.unpack_from('<I', data, 4)
    for i in range(struct.unpack_from('<H', data, offset)[0]):
        at = offset + 2 + 12 * i
        if struct.unpack_from('<H', data, at)[0] >= 60000:
            struct.pack_into('<HHII', data, at, code, 4, 500000, start)
    path.write_bytes(data + bytes(2 * 10**6))
    assert quickly(cli)[0] in (0, 1)


def test_tile_far_larger_than_the_picture(cli):
    tags = {**TAGS, 259: (3, [8]), 322: (4, [23168]), 323: (4, [23168])}
    write_tiff(cli.folder / 'hostile.tif', tags, [zlib.compress(bytes(2 * 23168 * 2000))])
    status, said = quickly(cli)
    assert status == 1
    assert 'hostile.tif: damaged: ' in said


def test_names_and_tags_that_libraries_know_are_no_matter(cli):
    """tifffile goes by some endings of names and by some tags; a description need not be what it begins like."""
    tifffile.imwrite('x.ndpi', cli.sky, photometric='rgb')
    assert cli('-i', 'x.ndpi') == 0
    write_tiff(cli.folder / 'lsm.tif', {**TAGS, 34412: (1, bytes(500))}, [GRAY.tobytes()])
    assert cli('-i', 'lsm.tif', '--overwrite') == 0
    for text in (b'{"shape": [1 2, 90, 120]}', b'{"shape": [,]}', b'ImageJ=\nimages=x\n', b'<OME'):
        write_tiff(cli.folder / 'text.tif', {**TAGS, 270: (2, text + b'\0')}, [GRAY.tobytes()])
        assert cli('-i', 'text.tif', '--overwrite') == 0
        assert read_tags(cli.folder / 'out.tif')[270][2] == text + b'\0'


def test_numbers_that_are_none(cli):
    sky = draw(n_channels=1, dtype=np.float32)[0]
    sky.view(np.uint32)[2, 60] = 0x7f800001  # a signaling NaN
    tifffile.imwrite('sky.tif', sky, photometric='miniswhite')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert cli() == 0
        huge = draw(n_channels=1, dtype=np.float64)[0]
        huge[3, 3] = 1.7e308
        tifffile.imwrite('sky.tif', huge)
        for arguments in (['--divide'], ['--sky', '1000']):
            assert cli('--overwrite', *arguments) == 0
    cli.fails('--overwrite', '--divide', '--sky', '1e18', match='a sky level of 1e+18 is too far from that')


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits of Linux')
def test_matplotlib_says_nothing(cli):
    variables = {'MPLBACKEND': 'foo', 'MPLCONFIGDIR': '/proc/x', 'MATPLOTLIBRC': 'rc'}
    (cli.folder / 'rc').write_text('no such key: 3\nlines.linewidth: wide\n')
    (cli.folder / 'tmp').mkdir()
    command = [sys.executable, str(ROOT / 'rmgradient.py'), '-q', '-i', 'sky.tif', '--preview', 'p.png', '-p',
               *words(cli.points)]
    done = subprocess.run(command, cwd=cli.folder, capture_output=True, text=True,
                          env={**os.environ, 'TMPDIR': str(cli.folder / 'tmp'), **variables})
    assert all(line.startswith('rmgradient: ') for line in done.stderr.splitlines()), done.stderr
    assert done.returncode == 0
    assert os.listdir(cli.folder / 'tmp') == []


def test_system_that_reads_little_at_once(cli, monkeypatch):
    """os.pread returns at most 2 GiB at once; here at most 1000 bytes."""
    assert cli() == 0
    expected = (cli.folder / 'out.tif').read_bytes()
    real = os.pread
    monkeypatch.setattr(os, 'pread', lambda file, size, offset: real(file, min(size, 1000), offset))
    assert cli('--overwrite') == 0
    assert (cli.folder / 'out.tif').read_bytes() == expected


@pytest.mark.parametrize('dtype', ['u1', 'u2', 'u4', 'u8', 'i1', 'i2', 'i4', 'i8'])
def test_integers_never_wrap(dtype):
    """Against whole numbers of Python's, of any size."""
    rng, limits = np.random.default_rng(3), np.iinfo(dtype)
    special = [limits.min, limits.min + 1, limits.max - 1, limits.max, 0, 1, limits.max // 2]
    values = np.array([*special, *rng.integers(limits.min, limits.max, 30, dtype=dtype, endpoint=True)], dtype)
    def exactly(value, shift):
        return round(fractions.Fraction(value) - fractions.Fraction(shift))

    shifts = [0.0, 0.5, -0.5, 3.0, -3.0, *(sign * 2.0**k for k in range(5, 66, 6) for sign in (-1, 1)),
              *(sign * np.nextafter(2.0**k, 0) for k in (31, 32, 53, 63, 64) for sign in (-1, 1))]
    for shift in shifts:
        after = correct(values[None, :, None], np.full((1, len(values), 1), shift))[0, :, 0]
        exact = [min(max(exactly(value, shift), limits.min), limits.max) for value in values.tolist()]
        # Floats have 53 bits. Ties are rounded to even, as by Python.
        error = max(abs(int(a) - b) for a, b in zip(after.tolist(), exact))
        assert error <= (2**11 if limits.max >= 2**53 else 0), shift


def test_numbers_at_the_ends_of_the_range(cli):
    y, x = np.mgrid[0:90, 0:120]
    sky = (1000.0 + x + 2 * y)[..., None]
    for scale in (1e-100, 1e100):
        assert np.abs(rg.remove_gradient(sky * scale, cli.points) / scale - 1148).max() < 60
    tifffile.imwrite('sky.tif', sky * 1e152)
    cli.fails(match='sky.tif: levels up to 1.')
    tifffile.imwrite('sky.tif', sky * 1e-173)
    cli.fails(match='multiply the picture by a power of ten')
    tifffile.imwrite('sky.tif', sky * 0)
    assert cli('--overwrite', '--smooth', '0.1') in (0, 1)


def test_alpha_of_white_is_zero(cli):
    rng = np.random.default_rng(1)
    for dtype in (np.float32, np.uint16):
        sky, _ = draw(n_channels=1, dtype=dtype)
        alpha = rng.permutation(np.linspace(0, 1 if dtype == np.float32 else 65535, sky.size)).reshape(sky.shape)
        picture = np.concatenate([sky, alpha.astype(dtype)], axis=2)
        tifffile.imwrite('sky.tif', picture, photometric='miniswhite', extrasamples=['unassalpha'],
                         planarconfig='contig')
        assert cli('--overwrite', '--sky', '0.5' if dtype == np.float32 else '30000') == 0
        assert_array_equal(tifffile.imread('out.tif')[..., 1], picture[..., 1])
        with rg.open_picture('sky.tif') as image:
            _, usable = image.usable(slice(0, 90), slice(0, 120))
            assert_array_equal(usable, picture[..., 1] != 0)


# ---- what gets out --------------------------------------------------------------------------------------------------

def test_nothing_unprintable_gets_out(cli):
    name = 'sky\x1b[31m\n1 2.tif'
    (cli.folder / 'sky.tif').rename(cli.folder / name)
    assert cli('-i', name, '--save-points', 'points') == 0
    assert '\x1b' not in cli.stderr
    assert 'sky\\x1b[31m\\n1 2.tif: fit: ' in cli.stderr
    assert len(rg.parse_points_file((cli.folder / 'points').read_text().splitlines())[0]) == len(cli.points)
    for arguments in (['-i', '\x1b[31m'], ['-o', 'no\nfolder\x07/x.tif'], ['--reference', '\x1b\u202e\x9b']):
        assert cli(*arguments) == 1
        assert cli.stderr.count('\n') == 1
        assert cli.stderr[:-1].isprintable()
    for arguments in (['--sky', '\x1b[31m'], ['--\x1b[31m'], ['--rows', 'a\x07'], ['-p', '\x1b', '1']):
        assert cli(*arguments, points=[]) == 2
        assert '\x1b' not in cli.stderr
        assert '\x07' not in cli.stderr
    os.mkfifo('name\x07')
    cli.fails('-i', 'name\x07', '-o', 'x', match='name\\x07: is not a regular file')


@pytest.mark.parametrize('option', ['-o', '-b', '--save-points', '-i', '-f', '--reference'])
def test_empty_names(cli, option):
    cli.fails(option, '', status=2, points=None if option != '-f' else [], match='the name of a file is empty')


def test_endless_points(cli, monkeypatch):
    if os.path.exists('/dev/zero'):
        cli.fails(points=['-f', '/dev/zero'], match='/dev/zero: is not a file of points: it has more than')

    class Endless(io.RawIOBase):
        lines = itertools.cycle([b'1 2\n' * 1000])

        def readable(self):
            return True

        def readinto(self, buffer):
            data = next(self.lines)[:len(buffer)]
            buffer[:len(data)] = data
            return len(data)
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BufferedReader(Endless())))
    cli.fails(points=['-f', '-'], match='standard input: is not a file of points')
    (cli.folder / 'many').write_text('\n'.join(f'{x} {y}' for x in range(80) for y in range(80)))
    cli.fails(points=['-f', 'many'], match='many: 6400 points are too many')


def test_libraries_use_no_words_of_their_own(cli, monkeypatch):
    for error in (TypeError("'<' not supported between instances"), IndexError('tuple index out of range'),
                  ValueError('could not convert'), KeyError(3), ZeroDivisionError('division by zero')):
        def fail(*_, error=error):
            raise error
        with monkeypatch.context() as patch_:
            patch_.setattr(rg, 'check_page', fail)
            cli.fails(match='sky.tif: damaged: TIFF libraries cannot read it')


def test_library_that_does_not_load(cli, monkeypatch):
    for error, match in ((ImportError('libopenblas.so: failed to map segment', name='scipy.interpolate._fitpack'),
                          'a library cannot be loaded (ImportError): not enough memory, or an incomplete installation'),
                         (ImportError('no memory'), 'a library cannot be loaded'),
                         (ModuleNotFoundError('no', name='scipy'), 'scipy is missing; run: '),
                         (ModuleNotFoundError('no', name='xy'), f'xy is missing; run: {rg.how_to_install("xy")}')):
        def fail(*_, error=error):
            raise error
        with monkeypatch.context() as patch_:
            patch_.setattr(rg, 'fit_background', fail)
            cli.fails('--smooth', '0.1', match=match)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits of Linux')
@pytest.mark.parametrize('megabytes', [60, 90, 120, 150, 170, 200])
def test_little_memory_is_one_line_and_soon(cli, megabytes):
    import resource
    command = [sys.executable, str(ROOT / 'rmgradient.py'), '-q', '-i', 'sky.tif', '-o', 'out.tif', '-p',
               *words(cli.points)]
    size = megabytes * 2**20
    done = subprocess.run(command, cwd=cli.folder, capture_output=True, text=True, timeout=30,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)))
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1
    assert 'memory' in done.stderr.lower()
    assert cli.files() == ['sky.tif']


# ---- stacks ---------------------------------------------------------------------------------------------------------

def imagej(images):
    lines = ['ImageJ=1.54f', f'images={images}', f'slices={images}', 'hyperstack=true', 'unit=micron', 'min=0.0', '']
    return '\n'.join(lines).encode() + b'\0'


def test_imagej_stack_of_one_page(cli):
    path = cli.folder / 'sky.tif'
    write_tiff(path, {**TAGS, 270: (2, imagej(5)), 50839: (1, b'labels'), 50838: (4, [6])}, [GRAY.tobytes()])
    path.write_bytes(path.read_bytes() + 4 * GRAY.tobytes())
    assert cli() == 0
    assert 'sky.tif: only the first of 5 pages is corrected, 4 are left out' in cli.stderr
    tags = read_tags(cli.folder / 'out.tif')
    assert tags[270][2] == b'ImageJ=1.54f\nunit=micron\nmin=0.0\n\0'
    assert 50838 not in tags
    assert 50839 not in tags
    with tifffile.TiffFile('out.tif') as tif:
        assert len(tif.series) == 1
        assert_array_equal(tif.series[0].shape, GRAY.shape[:2])
    write_tiff(cli.folder / 'sky.tif', {**TAGS, 270: (2, imagej(1)), 50839: (1, b'labels')}, [GRAY.tobytes()])
    assert cli('--overwrite') == 0
    assert 'warning' not in cli.stderr
    tags = read_tags(cli.folder / 'out.tif')
    assert tags[270][2] == imagej(1)
    assert tags[50839][2] == b'labels'


def test_points_file_of_dots(cli):
    """Such lines took a regular expression minutes."""
    lines = ['30 30', '60 60', '90 30', '# ' + '. ' * 3000 + 'x', '# ' + '.' * 200000 + 'x']
    (cli.folder / 'dots').write_text('\n'.join(lines))
    assert cli(points=['-f', 'dots']) == 0
    assert rg.count_numbers('15 15 ' + '. ' * 50000 + 'x') == 0
    (cli.folder / 'dots').write_text('30 30\n60 60\n90 30\n# 1 2 3 4\n')
    assert cli('--overwrite', points=['-f', 'dots']) == 0
    assert 'some lines' not in cli.stderr


def test_stacks_of_other_programs(cli):
    stack = np.stack([GRAY[..., 0]] * 5)
    tifffile.imwrite('shaped.tif', stack)
    tifffile.imwrite('truncated.tif', stack, truncate=True)
    tifffile.imwrite('ome.ome.tif', stack, ome=True)
    tifffile.imwrite('imagej.tif', stack, imagej=True)
    write_tiff(cli.folder / 'metamorph.tif', {**TAGS, 33629: (5, struct.pack('<30I', *range(30))), 33628: (4, [0])},
               [GRAY.tobytes()])
    for name, options in {'packed.tif': {}, 'packed_ome.tif': {'ome': True}}.items():  # smaller than what they hold
        tifffile.imwrite(name, stack, compression='zlib', **options)
    text = b'ImageJ=1.53\r\nimages=5'  # without an end of the last line
    write_tiff(cli.folder / 'ended.tif', {**TAGS, 270: (2, text + b'\0')}, [GRAY.tobytes()])
    with open(cli.folder / 'ended.tif', 'ab') as file:
        file.write(4 * GRAY.tobytes())
    data = bytearray((cli.folder / 'metamorph.tif').read_bytes() + 4 * GRAY.tobytes())
    at = data.find(struct.pack('<HH', 33629, 5))
    struct.pack_into('<I', data, at + 4, 5)
    (cli.folder / 'metamorph.tif').write_bytes(data)
    for name in ('shaped.tif', 'truncated.tif', 'ome.ome.tif', 'imagej.tif', 'metamorph.tif', 'packed.tif',
                 'packed_ome.tif', 'ended.tif'):
        assert cli('-i', name, '--overwrite') == 0
        assert f'{name}: only the first of 5 pages is corrected, 4 are left out' in cli.stderr
        tags = read_tags(cli.folder / 'out.tif')
        text = tags[270][2] if 270 in tags else b''
        assert not any(word in text for word in (b'images=', b'"shape"', b'<OME'))
        assert not {33628, 33629} & set(tags)
        with tifffile.TiffFile('out.tif') as tif:
            assert tif.asarray().shape == GRAY.shape[:2]


# ---- promises -------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc')
@pytest.mark.parametrize('arguments', [['-a', '-b', 'b.tif'], ['--smooth', '0.1', '--dither', '-p']])
def test_memory_does_not_grow_with_the_height(cli, arguments):
    """Peaks of two processes, one with a picture four times as high: the same but for a tenth of the rows more."""
    points = words(cli.points) if arguments[-1] == '-p' else []
    peaks = []
    for height in (1000, 4000):
        sky = np.random.default_rng(1).integers(1000, 1050, (height, 600, 3), np.uint16)
        tifffile.imwrite('hostile.tif', sky, photometric='rgb', rowsperstrip=100)
        done = subprocess.run([sys.executable, '-c', MEASURED, ROOT, '-q', '-i', 'hostile.tif', '-o', 'out.tif',
                               '--overwrite', *arguments, *points], capture_output=True, text=True, cwd=cli.folder)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1000)
    assert peaks[1] - peaks[0] < 0.1 * 3000 * 600 * 6 / 1e6


def test_no_more_results_wait_than_said():
    waiting, most = [0], [0]

    def work(i):
        waiting[0] += 1
        most[0] = max(most[0], waiting[0])
        return i
    with rg.threads(lambda results, *_: results) as starmap:
        for i, result in enumerate(starmap(work, [(i,) for i in range(200)])):
            assert result == i
            waiting[0] -= 1
            time.sleep(0.001)
    assert most[0] <= 2 * rg.N_WORKERS + 1


def test_message_for_which_there_is_no_memory(monkeypatch):
    """It ends the program, which then says so in one line, instead of being a traceback of logging's."""
    with rg.log_to_stderr(logging.INFO):
        monkeypatch.setattr(rg, 'printable', lambda text: bytearray(2**62))
        with pytest.raises(MemoryError):
            rg.logger.error('no memory')


def test_messages_to_nobody(monkeypatch, capsys):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError
    with monkeypatch.context() as patch_:
        patch_.setattr(sys, 'stderr', Gone())
        with rg.log_to_stderr(logging.INFO):
            rg.logger.error('nobody reads this')
    assert capsys.readouterr().err == ''


# ---- settings of other programs -------------------------------------------------------------------------------------

def test_preview_is_drawn_with_default_settings(cli):
    """Each of these made it fail."""
    pytest.importorskip('matplotlib')
    (cli.folder / 'matplotlibrc').write_text('text.usetex: True\nfigure.dpi: 1e9\ntoolbar: toolmanager\n')
    done = subprocess.run([sys.executable, ROOT / 'rmgradient.py', '-q', '-i', 'sky.tif', '-o', 'out.tif', '--preview',
                           'p.png', '-p', *words(cli.points)], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(line.startswith('rmgradient: warning: ') for line in done.stderr.splitlines())
    assert (cli.folder / 'p.png').stat().st_size > 10000


def test_preview_needs_no_backend(cli):
    pytest.importorskip('matplotlib')
    for backend in ('module://no_such.backend',):
        done = subprocess.run([sys.executable, ROOT / 'rmgradient.py', '-q', '-i', 'sky.tif', '--overwrite',
                               '--preview', 'p.png', '-p', *words(cli.points)], capture_output=True, text=True,
                              env=os.environ | {'MPLBACKEND': backend})
        assert done.returncode == 0, done.stderr


def test_preview_that_fails_does_not_cost_the_picture(cli, monkeypatch):
    pytest.importorskip('matplotlib')

    def fail(*_, **__):
        raise ValueError('of the library')

    monkeypatch.setattr('matplotlib.figure.Figure.savefig', fail)
    assert cli('--preview', 'p.png', '--save-points', 'points') == 1
    assert 'error: p.png: cannot be drawn by matplotlib (ValueError)' in cli.stderr
    assert cli.files() == ['out.tif', 'points', 'sky.tif']


def test_homes_that_can_not_be_used(cli):
    """As with sudo -u, and in services."""
    fits = pytest.importorskip('astropy.io.fits')
    pytest.importorskip('matplotlib')
    sky = np.rint(np.random.default_rng(1).normal(900, 9, (90, 120))).astype('u2')
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(sky)]).writeto('sky.fits.fz')
    nowhere = dict.fromkeys(('HOME', 'XDG_CONFIG_HOME', 'XDG_CACHE_HOME'), os.path.join(os.devnull, 'x'))
    done = subprocess.run([sys.executable, ROOT / 'rmgradient.py', '-i', 'sky.fits.fz', '-o', 'out.fits', '--preview',
                           'p.png', '-p', *words(cli.points)], capture_output=True, text=True, env=os.environ | nowhere)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith('rmgradient: ') for line in done.stderr.splitlines())


# ---- no stream, no numbers ------------------------------------------------------------------------------------------

class Dumb:
    """A stream that is no file."""

    def write(self, _):
        pass

    def flush(self):
        pass


@pytest.mark.parametrize('kind', ['none', 'closed', 'dumb'])
def test_standard_error_that_is_none(cli, monkeypatch, kind):
    import tqdm  # noqa: F401
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, 'stderr', {'none': None, 'closed': closed, 'dumb': Dumb()}[kind])
    assert rg.main(['-i', 'sky.tif', '-o', 'out.tif', '-p', *words(cli.points)]) == 0
    assert rg.main(['-i', 'sky.tif', '-o', 'out.tif', '-p', *words(cli.points)]) == 1  # it exists


@pytest.mark.parametrize('reference', [False, True])
@pytest.mark.parametrize('kind', ['inf', 'huge', 'flat', 'constant'])
def test_no_warnings_of_numpy(cli, kind, reference):
    rng = np.random.default_rng(1)
    sky = rng.normal(0.3, 0.01, (210, 280, 3)).astype(np.float64)
    sky[60:84, 60:84], sky[60:84, 84:108] = np.inf, -np.inf
    sky[200, 50], sky[201, 50] = np.inf, -np.inf
    sky = {'inf': sky, 'huge': np.where(np.isfinite(sky), sky, 1e308), 'flat': np.full((210, 280, 3), 7, 'u1'),
           'constant': np.dstack([rng.normal(50, 3, (210, 280, 2)), np.full((210, 280), 9)]).astype('u1')}[kind]
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        more = ['--reference', 'sky.tif'] if reference else ['--preview', 'p.png']
        status = cli('-q', *more, points=['-a'])
    assert status == 0 or reference, cli.stderr
    assert all(line.startswith('rmgradient: ') for line in cli.stderr.splitlines())


def test_full_disk_names_the_output(cli):
    fits = pytest.importorskip('astropy.io.fits')
    if not os.path.exists('/dev/full'):
        pytest.skip('needs /dev/full')
    fits.writeto('sky.fits', cli.sky[..., 0], fits.Header([(f'K{i}', i) for i in range(300)]))
    assert cli('-i', 'sky.fits', '-o', '/dev/full') == 1
    assert 'error: /dev/full: No space left on device' in cli.stderr


# ---- loading --------------------------------------------------------------------------------------------------------

@posix
def test_interruption_while_loading(cli):
    """Handlers come first: whenever the signal comes, there is no traceback of ours."""
    lines = (ROOT / 'rmgradient.py').read_text(encoding='utf-8').splitlines()
    shown, first = 0, next(i for i, line in enumerate(lines, 1) if '_signal.signal(' in line)
    for delay in np.linspace(0.02, 0.25, 8):
        process = subprocess.Popen([sys.executable, ROOT / 'rmgradient.py', '-i', 'sky.tif', '-o', 'out.tif', '-a'],
                                   stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        message = process.communicate()[1]
        # What comes while the interpreter reads and compiles the file, it raises at the first lines.
        line = re.search(r'rmgradient.py", line (\d+)', message)
        shown += line is not None and 'Traceback' in message and int(line[1]) > first
        (cli.folder / 'out.tif').unlink(missing_ok=True)
    assert shown == 0
