# SPDX-License-Identifier: Apache-2.0
"""TIFF files of all kinds, in and out."""
import itertools
import os
import shutil
import struct
import subprocess

import imagecodecs
import numpy as np
import pytest
import tifffile
from helpers import draw, posix, words
from numpy.testing import assert_allclose, assert_array_equal
from tiff_files import HEIGHT, WIDTH, gray_tags, read_tags, write_rich, write_tiff

import rmgradient as rg


@pytest.fixture(scope='module')
def gray():
    return draw(n_channels=1)[0][..., 0]


def read_all(path, rows=37):
    """Read a file in groups of rows, and a window."""
    with rg.TiffImage(str(path)) as image:
        height, _, _ = image.shape
        everything = np.concatenate([image.read(*group) for group in rg.row_groups(height, rows)])
        assert_array_equal(everything[5:50, 7:100], image.read(5, 50, 7, 100))
        return everything


# ---- reading --------------------------------------------------------------------------------------------------------

LAYOUTS = {'one strip': {'rowsperstrip': HEIGHT}, 'rows': {'rowsperstrip': 1}, 'strips': {'rowsperstrip': 16},
           'tiles': {'tile': (32, 48)}, 'large tile': {'tile': (128, 128)}}
CODINGS = {'none': {}, 'deflate': {'compression': 'zlib'}, 'deflate 32946': {'compression': 'deflate'},
           'LZW': {'compression': 'lzw'}, 'PackBits': {'compression': 'packbits'}, 'zstd': {'compression': 'zstd'},
           'LZMA': {'compression': 'lzma'}, 'deflate, predictor': {'compression': 'zlib', 'predictor': True},
           'LZW, predictor': {'compression': 'lzw', 'predictor': True},
           'zstd, predictor': {'compression': 'zstd', 'predictor': True}}


KINDS_OF_PIXELS = [('<', 'contig', 3), ('>', 'separate', 4), ('>', 'contig', 2), ('<', None, 1)]


@pytest.mark.parametrize(('layout', 'coding', 'dtype'), [
    *itertools.product(LAYOUTS, CODINGS, ['u2']), *itertools.product(['strips', 'tiles'], CODINGS, ['f4']),
    *itertools.product(['strips', 'tiles'], ['none', 'LZW, predictor'],
                       ['u1', 'u4', 'i1', 'i2', 'i4', 'f2', 'f8']),
    *itertools.product(['strips', 'tiles'], ['none', 'deflate'], ['u8', 'i8'])])
def test_layouts_codings_and_types(tmp_path, layout, coding, dtype):
    if (layout, coding) == ('rows', 'LZMA'):
        pytest.skip('takes its writer seconds')
    sky, _ = draw(n_channels=4, dtype=np.dtype(dtype))
    for order, planarconfig, n_samples in KINDS_OF_PIXELS:
        picture = sky[..., :n_samples] if n_samples > 1 else sky[..., 0]
        tifffile.imwrite(tmp_path / 'a.tif', picture if planarconfig != 'separate' else picture.transpose(2, 0, 1),
                         photometric='rgb' if n_samples > 2 else 'minisblack', planarconfig=planarconfig,
                         byteorder=order, bigtiff=n_samples == 2, **LAYOUTS[layout], **CODINGS[coding],
                         **({'extrasamples': [0]} if n_samples in (2, 4) else {}))
        again = read_all(tmp_path / 'a.tif')
        assert again.dtype == sky.dtype
        assert_array_equal(again, picture.reshape(again.shape))


@pytest.mark.parametrize('shape', [(1, 400), (400, 1), (1, 1), (50, 50), (49, 300)])
def test_small_pictures(tmp_path, shape):
    picture = np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape)
    tifffile.imwrite(tmp_path / 'a.tif', picture, compression='zlib')
    with rg.TiffImage(str(tmp_path / 'a.tif')) as image:
        assert_array_equal(image.read(0, shape[0])[..., 0], picture)


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('bigtiff', [False, True])
def test_files_of_other_writers(tmp_path, gray, order, bigtiff):
    data = gray.astype(order + 'u2').tobytes()
    strips = [data[y * 240:(y + 7) * 240] for y in range(0, HEIGHT, 7)]
    variants = {
        'no RowsPerStrip': (gray_tags(t278=None), [data]),
        'endless RowsPerStrip': (gray_tags(t278=(4, [2**32 - 1])), [data]),
        'no StripByteCounts': (gray_tags(t279=None), [data]),
        'defaults left out': (gray_tags(t259=None, t277=None), [data]),
        'strips': (gray_tags(t278=(3, [7])), strips),
        'generous last strip': (gray_tags(t278=(3, [7])), [*strips[:-1], strips[-1] + bytes(960)]),
        'filled backward': (gray_tags(t266=(3, [2])), [imagecodecs.bitorder_decode(data)]),
        'short sizes': (gray_tags(t256=(3, [WIDTH]), t257=(3, [HEIGHT])), [data]),
    }
    for name, (tags, strips_) in variants.items():
        write_tiff(tmp_path / 'a.tif', tags, strips_, order, bigtiff)
        assert_array_equal(read_all(tmp_path / 'a.tif')[..., 0], gray, err_msg=name)


def test_white_is_zero(cli):
    for dtype in ('u1', 'u2', 'i2', 'f4'):
        sky, _ = draw(n_channels=1, dtype=np.dtype(dtype))
        tifffile.imwrite('black.tif', sky[..., 0], photometric='minisblack')
        tifffile.imwrite('white.tif', rg.invert(sky)[..., 0], photometric='miniswhite')
        for name in ('black', 'white'):
            assert cli('-i', f'{name}.tif', '-o', f'{name}_out.tif', '-b', f'{name}_bg.tif', '--overwrite') == 0
        for kind in ('out', 'bg'):
            with tifffile.TiffFile(f'white_{kind}.tif') as tif:
                assert tif.pages[0].photometric == 0
            # The same picture of light; 1 - x in float32 costs a rounding of values below 1.
            assert_allclose(rg.invert(tifffile.imread(f'white_{kind}.tif')[..., None])[..., 0].astype(float),
                            tifffile.imread(f'black_{kind}.tif').astype(float), rtol=0,
                            atol=2e-7 if dtype == 'f4' else 0)


@pytest.mark.parametrize('orientation', [3, 6])
def test_orientation_is_a_tag(cli, orientation):
    assert cli('-o', 'plain.tif') == 0
    tifffile.imwrite('sky.tif', cli.sky, photometric='rgb', extratags=[(274, 3, 1, orientation, True)])
    assert cli() == 0
    with tifffile.TiffFile('out.tif') as tif:
        assert tif.pages[0].tags[274].value == orientation
        assert_array_equal(tif.asarray(), tifffile.imread('plain.tif'))


def test_segments_are_decoded_once(tmp_path, monkeypatch):
    sky, _ = draw()
    tifffile.imwrite(tmp_path / 'a.tif', sky, photometric='rgb', compression='zlib', tile=(64, 64))
    read, segments = rg.RandomAccess.read, []
    with rg.TiffImage(str(tmp_path / 'a.tif')) as image:
        monkeypatch.setattr(rg.RandomAccess, 'read', lambda *arguments: segments.append(1) or read(*arguments))
        for y in range(0, HEIGHT, 10):
            assert_array_equal(image.read(y, y + 10), sky[y:y + 10])
    assert len(segments) == 4


def test_many_threads_read_the_same(tmp_path):
    sky, _ = draw(height=300)
    tifffile.imwrite(tmp_path / 'a.tif', sky, photometric='rgb', compression='zlib', rowsperstrip=31)
    with rg.TiffImage(str(tmp_path / 'a.tif')) as image, rg.threads(lambda results, *_: results) as starmap:
        groups = rg.row_groups(300, 10) * 5
        for (start, stop), rows in zip(groups, starmap(image.read, groups)):
            assert_array_equal(rows, sky[start:stop])


# ---- refusals -------------------------------------------------------------------------------------------------------

def flat(n, **more):
    """Return tags and data of a gray picture of one strip of n bytes a pixel."""
    return gray_tags(**more), [bytes(HEIGHT * WIDTH * n)]


REFUSED = {
    'palette': (*flat(1, t258=(3, [8]), t262=(3, [3])), 'colors are a palette; convert the picture to gray or RGB'),
    'CMYK': (*flat(4, t258=(3, [8] * 4), t262=(3, [5]), t277=(3, [4])), 'colors are CMYK'),
    'Lab': (*flat(3, t258=(3, [8] * 3), t262=(3, [8]), t277=(3, [3])), 'colors are CIE Lab'),
    'YCbCr': (*flat(3, t258=(3, [8] * 3), t262=(3, [6]), t277=(3, [3])), 'colors are YCbCr'),
    'colors 99': (*flat(2, t262=(3, [99])), 'colors are of unknown kind 99'),
    'colors not said': (*flat(2, t262=None), 'no kind of colors given'),
    '1 bit': (*flat(1, t258=(3, [1])), 'pixels are integers of 1 bit'),
    '4 bit': (*flat(1, t258=(3, [4])), 'pixels are integers of 4 bit'),
    '12 bit': (*flat(2, t258=(3, [12])), 'pixels are integers of 12 bit'),
    '0 bit': (*flat(2, t258=(3, [0])), 'pixels are integers of 0 bit'),
    'float24': (*flat(3, t258=(3, [24]), t339=(3, [3])), 'pixels are floating point numbers of 24 bit'),
    'complex': (*flat(8, t258=(3, [64]), t339=(3, [6])), 'pixels are complex numbers'),
    'format 9': (*flat(2, t339=(3, [9])), 'pixels are of unknown format 9'),
    'mixed bits': (*flat(4, t258=(3, [8, 8, 16]), t262=(3, [2]), t277=(3, [3])), 'channels have different types'),
    'mixed formats': (*flat(12, t258=(3, [32] * 3), t262=(3, [2]), t277=(3, [3]), t339=(3, [1, 1, 3])),
                      'channels have different types'),
    'premultiplied alpha': (*flat(4, t277=(3, [2]), t258=(3, [16] * 2), t338=(3, [1])), 'multiplied by alpha'),
    'two of three colors': (*flat(4, t262=(3, [2]), t277=(3, [2]), t258=(3, [16] * 2)), '2 channels instead of 3'),
    'too many extra samples': (*flat(2, t338=(3, [0, 0])), '2 extra samples and 1 of 1 channels'),
    'volume': (*flat(2, t32997=(4, [3])), 'a volume'),
    'no rows a strip': (*flat(2, t278=(4, [0])), 'strips or tiles without pixels'),
    'no width': (*flat(2, t256=(4, [0])), '0 x 90 pixels'),
    'width missing': (*flat(2, t256=None), 'no width given'),
    'height missing': (*flat(2, t257=None), 'no height given'),
    'planar 3': (*flat(2, t284=(3, [3])), 'planar configuration 3'),
    'JPEG': (*flat(2, t259=(3, [7])), 'compression is JPEG; save with LZW'),
    'compression 777': (*flat(2, t259=(3, [777])), 'compression is of unknown kind 777'),
    'predictor 3 of integers': (*flat(2, t259=(3, [8]), t317=(3, [3])), 'predictor 3 for uint16'),
    'predictor 9': (*flat(2, t259=(3, [8]), t317=(3, [9])), 'predictor 9'),
    'predictor alone': (*flat(2, t317=(3, [2])), 'a predictor without a compression'),
    'thumbnail first': (*flat(2, t254=(4, [1])), 'the first page is a thumbnail'),
    'old thumbnail first': (*flat(2, t255=(3, [2])), 'the first page is a thumbnail'),
    'offset past the end': (*flat(2, t273=(4, [10**6])), 'segment 0 of 1 ends at byte 1021600 of a file of'),
    'size past the end': (*flat(2, t279=(4, [10**6])), 'segment 0 of 1 ends at byte'),
    'no offset': (*flat(2, t273=(4, [0])), 'segment 0 of 1 is missing'),
    'empty strip': (*flat(2, t279=(4, [0])), 'segment 0 of 1 is missing'),
    'short strip': (*flat(2, t279=(4, [100])), 'segment 0 of 1 has 100 bytes, too few for 90 rows of 240 bytes'),
    'too few strips': (*flat(2, t278=(4, [10])), '1 offsets and 1 sizes for 9 segments'),
    'overlapping strips': (gray_tags(t278=(4, [45]), t273=(4, [8, 8]), t279=(4, [20000, 20000])), [bytes(21600)],
                           'segments of 40000 bytes overlap'),
    '20 GB in 20 kB': (*flat(2, t256=(4, [10**5]), t257=(4, [10**5]), t278=(4, [10**5])), 'too few for 100000 rows'),
    'deflate bomb': (*flat(2, t259=(3, [8]), t256=(4, [2**31]), t257=(4, [2**20]), t278=(4, [2**20])), 'too few for'),
    'zstd bomb': (*flat(2, t259=(3, [50000]), t256=(4, [2**31]), t257=(4, [2**31]), t278=(4, [2**31])), 'too few for'),
    'damaged deflate': (gray_tags(t259=(3, [8])), [b'x' * 5000], 'damaged: '),
    'damaged LZW': (gray_tags(t259=(3, [5])), [b'x' * 5000], 'damaged: '),
    'damaged zstd': (gray_tags(t259=(3, [50000])), [b'x' * 5000], 'damaged: '),
    'damaged LZMA': (gray_tags(t259=(3, [34925])), [b'x' * 5000], 'damaged: '),
    'short PackBits': (gray_tags(t259=(3, [32773])), [b'\x81\0' * 50 + b'\x7f' * 2000], 'damaged: '),
}


@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.parametrize('order', '<>')
def test_refusals(cli, name, order):
    tags, data, match = REFUSED[name]
    write_tiff(cli.folder / 'sky.tif', tags, data, order)
    line = cli.fails('-s', 2, match=match)
    assert line.startswith('rmgradient: error: sky.tif: ')


@pytest.mark.parametrize(('code', 'encode'), [
    (8, imagecodecs.zlib_encode), (5, imagecodecs.lzw_encode), (32773, imagecodecs.packbits_encode),
    (50000, imagecodecs.zstd_encode), (34925, imagecodecs.lzma_encode)])
def test_truncated_streams(cli, gray, code, encode):
    """A complete table of segments, but one of them is shorter inside than it claims."""
    data = gray.tobytes()
    whole = encode(data)
    for strip in (whole[:len(whole) // 2], whole[:-300], encode(data[:len(data) // 2])):
        write_tiff(cli.folder / 'sky.tif', gray_tags(t259=(3, [code])), [strip])
        cli.fails(match='sky.tif: damaged: ')
    write_tiff(cli.folder / 'sky.tif', gray_tags(t259=(3, [code])), [whole])
    assert cli() == 0


@posix
def test_things_that_are_no_files(cli):
    os.mkfifo('fifo.tif')
    os.symlink('nowhere', 'broken.tif')
    for name, match in [('fifo.tif', 'not a regular file'), ('.', 'is a folder'),
                        ('broken.tif', 'broken.tif: No such file'), ('/dev/null', 'not a regular file')]:
        cli.fails('-i', name, match=match)


@posix
def test_file_that_shrinks_while_it_is_read(cli, monkeypatch):
    tifffile.imwrite('sky.tif', cli.sky, photometric='rgb', rowsperstrip=10)
    find_sky = rg.find_sky

    def shrink(*arguments):
        os.truncate('sky.tif', 20000)
        return find_sky(*arguments)
    monkeypatch.setattr(rg, 'find_sky', shrink)
    assert cli() == 1
    assert 'sky.tif: damaged: it ends at byte 20000' in cli.stderr
    assert cli.files() == ['sky.tif']


def test_random_damage_is_never_a_traceback(cli):
    """Change bytes in the structure of small files: every run ends well or with one line."""
    tifffile.imwrite('sky.tif', cli.sky, photometric='rgb', compression='zlib', rowsperstrip=30, predictor=True,
                     extratags=[(34675, 7, 300, bytes(300), True), (700, 1, 50, bytes(50), True)])
    good = (cli.folder / 'sky.tif').read_bytes()
    with tifffile.TiffFile('sky.tif') as tif:
        directory = tif.pages[0].offset
    rng = np.random.default_rng(9)
    n_refused = 0
    for _ in range(200):
        bad = bytearray(good)
        for place in rng.integers(0, 250, rng.integers(1, 4)):
            bad[directory + place if place > 8 else place] = rng.integers(256)
        (cli.folder / 'sky.tif').write_bytes(bad)
        if cli('-q') == 0:
            (cli.folder / 'out.tif').unlink()
        else:
            assert cli.stderr.count('\n') == 1 + cli.stderr.count('warning: ')
            n_refused += 1
        assert cli.files() == ['sky.tif']
    assert n_refused > 50


# ---- pages ----------------------------------------------------------------------------------------------------------

def test_pages(cli, gray):
    def write(*pages):
        write_tiff(cli.folder / 'sky.tif', gray_tags(), [gray.tobytes()], pages=pages)
        assert cli('--overwrite', '-q') == 0
        with tifffile.TiffFile('out.tif') as tif:
            assert len(tif.pages) == 1
        return cli.stderr

    full = {256: (4, [WIDTH]), 257: (4, [HEIGHT])}
    half = {256: (4, [WIDTH // 2]), 257: (4, [HEIGHT // 2])}
    assert write() == ''
    assert write(half | {254: (4, [1])}, half) == ''
    assert write(full | {254: (4, [1])}) == ''
    assert write(full) == 'rmgradient: warning: sky.tif: only the first of 2 pages is corrected, 1 is left out\n'
    assert 'first of 3 pages is corrected, 2 are left out' in write(full | {254: (4, [2])}, half, full)
    assert 'only the first of 2 pages' in write({256: (4, [100]), 257: (4, [10])})


def test_pages_in_a_circle(cli, gray):
    write_tiff(cli.folder / 'sky.tif', gray_tags(), [gray.tobytes()], pages=[{256: (4, [WIDTH]), 257: (4, [HEIGHT])}])
    data = bytearray((cli.folder / 'sky.tif').read_bytes())
    data[-4:] = data[4:8]  # the second page points to the first
    (cli.folder / 'sky.tif').write_bytes(data)
    assert cli('-q') == 0
    assert 'only the first of 2 pages' in cli.stderr


def test_lying_descriptions(cli):
    assert cli('-o', 'plain.tif') == 0
    for description in ('{"shape": [5000, 90, 120, 3]}', 'ImageJ=1.53\nimages=5000\nslices=5000\n',
                        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image>'
                        '<Pixels SizeX="120" SizeY="90" SizeZ="5000" Type="uint16"/></Image></OME>'):
        tifffile.imwrite('sky.tif', cli.sky, photometric='rgb', description=description, metadata=None)
        assert cli('--overwrite') == 0
        assert read_tags(cli.folder / 'out.tif')[270] == read_tags(cli.folder / 'sky.tif')[270]
        with tifffile.TiffFile('out.tif') as tif:
            assert_array_equal(tif.pages[0].asarray(), tifffile.imread('plain.tif'))


# ---- tags -----------------------------------------------------------------------------------------------------------

STRUCTURE = {254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 339}


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('bigtiff', [False, True])
@pytest.mark.parametrize('level', [0, 1])
def test_tags_come_along_byte_for_byte(cli, gray, order, bigtiff, level):
    write_rich(cli.folder / 'sky.tif', gray, order, bigtiff)
    before = read_tags(cli.folder / 'sky.tif')
    assert {34665, 34853} < set(before)
    assert cli('-b', 'bg.tif', '-q', '-c', level) == 0
    assert cli.stderr == ''
    for name in ('out.tif', 'bg.tif'):
        after = read_tags(cli.folder / name)
        kept = {code: value for code, value in before.items() if code not in STRUCTURE | {280, 281, 37724}}
        assert {code: value for code, value in after.items() if code not in STRUCTURE} == kept
        # Byte order, and classic or BigTIFF.
        assert (cli.folder / name).read_bytes()[:4] == (cli.folder / 'sky.tif').read_bytes()[:4]


def test_tags_of_each_sample_fit_the_background(cli):
    sky, _ = draw(n_channels=4)
    tifffile.imwrite('sky.tif', sky, photometric='rgb', extrasamples=[2], extratags=[(341, 3, 4, (9, 9, 9, 9), True)])
    assert cli('-b', 'bg.tif') == 0
    assert read_tags(cli.folder / 'out.tif')[341][1] == 4
    assert read_tags(cli.folder / 'bg.tif')[341][1] == 3
    assert read_tags(cli.folder / 'out.tif')[338] == (3, 1, b'\2\0')
    assert 338 not in read_tags(cli.folder / 'bg.tif')


@pytest.mark.parametrize(('code', 'status', 'match'), [
    (34675, 1, 'error: sky.tif: the ICC profile cannot be read'),
    (700, 1, 'error: sky.tif: the XMP packet cannot be read'),
    (50000, 0, 'warning: sky.tif: tag 50000 cannot be read and is left out')])
def test_tags_that_cannot_be_read(cli, gray, code, status, match):
    write_tiff(cli.folder / 'sky.tif', gray_tags() | {code: (7, b'?' * 500)}, [gray.tobytes()])
    data = bytearray((cli.folder / 'sky.tif').read_bytes())
    place = data.index(struct.pack('<HHI', code, 7, 500))
    struct.pack_into('<I', data, place + 8, len(data) - 100)
    (cli.folder / 'sky.tif').write_bytes(data)
    assert cli('-q') == status
    assert match in cli.stderr
    assert cli.files() == ['out.tif', 'sky.tif'][status:]


def test_exif_that_points_nowhere_is_left_out(cli, gray):
    write_tiff(cli.folder / 'sky.tif', gray_tags(t34665=(4, [10**6])), [gray.tobytes()])
    assert cli('-q') == 0
    assert cli.stderr == 'rmgradient: warning: sky.tif: EXIF cannot be read and is left out\n'


@pytest.mark.skipif(not shutil.which('exiftool'), reason='needs exiftool')
@pytest.mark.parametrize('order', '<>')
def test_exiftool_sees_the_same(cli, gray, order):
    write_rich(cli.folder / 'sky.tif', gray, order, False)
    assert cli() == 0
    other = ('System]', 'ExifTool]', 'Composite]', 'StripOffsets', 'StripByteCounts', 'RowsPerStrip', 'SubfileType',
             'PlanarConfig', 'SampleFormat', 'MinSampleValue', 'MaxSampleValue', 'ImageSourceData')
    seen = []
    for name in ('sky.tif', 'out.tif'):
        lines = subprocess.run(['exiftool', '-a', '-G1', '-s', '-u', '-ee', name], capture_output=True, text=True,
                               check=True)
        assert lines.stderr == ''
        seen.append([line for line in lines.stdout.splitlines() if not any(word in line for word in other)])
    assert seen[0] == seen[1]
    assert len(seen[0]) > 35


@pytest.mark.skipif(not shutil.which('tiffinfo'), reason='needs libtiff-tools')
@pytest.mark.parametrize('level', [0, 1])
@pytest.mark.parametrize('dtype', ['u1', 'u2', 'u4', 'i2', 'f4', 'f8'])
def test_libtiff_reads_the_same(cli, level, dtype):
    sky, _ = draw(dtype=np.dtype(dtype))
    for order, bigtiff in itertools.product('<>', [False, True]):
        tifffile.imwrite('sky.tif', sky, photometric='rgb', byteorder=order, bigtiff=bigtiff)
        assert cli('-c', level, '-r', 17, '--overwrite') == 0
        for command in (['tiffinfo', '-D', 'out.tif'], ['tiffcp', '-c', 'none', 'out.tif', 'copy.tif']):
            done = subprocess.run(command, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, '')
        assert_array_equal(tifffile.imread('copy.tif'), tifffile.imread('out.tif'))


def test_large_outputs_are_bigtiff(tmp_path):
    """Decided by the size, before a strip is asked for."""
    class Enough(Exception):
        pass

    def strip_at(*_):
        raise Enough

    tifffile.imwrite(tmp_path / 'a.tif', np.zeros((100, 100), np.uint16))
    for size, magic in [((30000, 70000), 42), ((31000, 70000), 43)]:
        with rg.TiffImage(str(tmp_path / 'a.tif')) as image, open(tmp_path / 'b.tif', 'w+b') as file:
            image.shape = *size, 1
            with pytest.raises(Enough):
                image.write(file, strip_at, 'output', rg.Settings())
            file.seek(2)
            assert file.read(1) == bytes([magic])


def test_pages_in_any_order_and_in_a_circle(cli):
    """The first directory behind the second one, at byte 8, and a last one that leads to the first again."""
    for page in range(2):
        tifffile.imwrite('two.tif', cli.sky, photometric='rgb', append=page > 0, metadata=None)
    data = bytearray((cli.folder / 'two.tif').read_bytes())
    first, = struct.unpack_from('<I', data, 4)
    next_of_first = first + 2 + 12 * struct.unpack_from('<H', data, first)[0]
    second, = struct.unpack_from('<I', data, next_of_first)
    next_of_second = second + 2 + 12 * struct.unpack_from('<H', data, second)[0]
    assert first == 8
    for begin, links in ((second, {next_of_second: first, next_of_first: 0}),
                         (first, {next_of_first: second, next_of_second: first})):
        struct.pack_into('<I', data, 4, begin)
        for place, target in links.items():
            struct.pack_into('<I', data, place, target)
        (cli.folder / 'two.tif').write_bytes(data)
        assert cli('-i', 'two.tif', '--overwrite') == 0
        assert 'only the first of 2 pages is corrected, 1 is left out' in cli.stderr
        assert 'damaged' not in cli.stderr


@pytest.mark.parametrize('extra', [(), ('unassalpha',)])
def test_bands_without_a_kind_of_color_are_all_colors(cli, extra):
    """As GDAL and rasterio write them: gray, with unspecified extra samples."""
    samples = np.dstack([cli.sky[..., ::-1], *[np.full((90, 120), 65535, np.uint16)] * len(extra)])
    tifffile.imwrite('bands.tif', samples, photometric='minisblack', planarconfig='contig', metadata=None,
                     extrasamples=['unspecified', 'unspecified', *extra])
    assert cli('-i', 'bands.tif', '-b', 'b.tif', '--preview', 'p.png') == 0
    expected = rg.remove_gradient(cli.sky[..., ::-1], cli.points)
    assert_array_equal(tifffile.imread('out.tif')[..., :3], expected)
    assert_array_equal(tifffile.imread('out.tif')[..., 3:], samples[..., 3:])
    for name in ('out.tif', 'b.tif'):
        with tifffile.TiffFile(name) as file:
            page = file.pages.first
            assert page.photometric == 1
            assert page.samplesperpixel == len(page.extrasamples) + 1 == (3 if name == 'b.tif' else samples.shape[2])
    four = np.dstack([cli.sky, cli.sky[..., 0]])
    tifffile.imwrite('four.tif', four.transpose(2, 0, 1), photometric='minisblack', planarconfig='separate',
                     metadata=None)
    assert cli('-i', 'four.tif', '-o', 'four_out.tif', '--preview', 'p.png', '--overwrite') == 0
    assert_array_equal(tifffile.imread('four_out.tif').reshape(90, 120, -1).shape, four.shape)


@pytest.mark.parametrize(('dtype', 'nodata'), [('u2', '17'), ('f4', '-9999'), ('i2', '-32768 ')])
def test_nodata_of_gdal_is_no_data(cli, dtype, nodata):
    sky = (cli.sky // 3).astype(dtype)
    hole = np.zeros((90, 120), bool)
    hole[:, 100:] = hole[40:44, 60:64] = True
    sky[hole] = float(nodata)
    tifffile.imwrite('sky.tif', sky, photometric='rgb', metadata=None, extratags=[(42113, 's', 0, nodata, True)])
    places = [(30, 30), (60, 60), (85, 30), (30, 60)]
    assert cli(points=['-p', *words(places)]) == 0
    out = tifffile.imread('out.tif')
    assert_array_equal((out == float(nodata)).all(axis=2), hole)
    with rg.open_picture('sky.tif') as picture:
        assert_array_equal(picture.usable(slice(0, 90), slice(0, 120))[1], ~hole)
    for odd in ('none', '1e99', '0.5' if dtype != 'f4' else 'nan'):
        tifffile.imwrite('odd.tif', cli.sky.astype(dtype), photometric='rgb', metadata=None,
                         extratags=[(42113, 's', 0, odd, True)])
        with rg.open_picture('odd.tif') as picture:
            assert picture.blank is None


def test_associated_alpha_that_is_opaque_everywhere(cli):
    for least, good in ((65535, True), (65534, False)):
        alpha = np.full((90, 120), 65535, np.uint16)
        alpha[70, 3] = least
        tifffile.imwrite('alpha.tif', np.dstack([cli.sky, alpha]), photometric='rgb', extrasamples=['assocalpha'])
        if good:
            assert cli('-i', 'alpha.tif') == 0
            assert_array_equal(tifffile.imread('out.tif')[..., :3], rg.remove_gradient(cli.sky, cli.points))
            with tifffile.TiffFile('out.tif') as file:
                assert file.pages.first.extrasamples == (1,)
        else:
            cli.fails('-i', 'alpha.tif', '-o', 'x.tif', match='alpha.tif: colors are multiplied by alpha')
