# SPDX-License-Identifier: Apache-2.0
"""FITS pictures: pixels against TIFF, headers byte for byte, all kinds of files, and damage."""
import gzip
import itertools
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tifffile
from helpers import ROOT, draw, scatter, words
from numpy.testing import assert_array_equal

import rmgradient as rg

fits = pytest.importorskip('astropy.io.fits')
pytestmark = pytest.mark.filterwarnings('ignore::astropy.io.fits.verify.VerifyWarning')


def planes(sky):
    """Return (height, width, n_channels) as planes, or as a single one."""
    return sky[..., 0] if sky.shape[2] == 1 else np.ascontiguousarray(sky.transpose(2, 0, 1))


@pytest.fixture
def run(cli):
    """Correct a FITS file, and return what astropy reads of the output."""
    def run(*arguments, name='sky.fits', **more):
        assert cli('-i', name, '-o', 'out.fits', *arguments, **more) == 0, cli.stderr
        return fits.getdata(cli.folder / 'out.fits')
    run.cli = cli
    return run


def cards_of(path, start=0):
    """Return the cards of a header, as they are in the file, and where its data begin."""
    data, cards = path.read_bytes()[start:], []
    while not cards or cards[-1].rstrip() != b'END':
        cards.append(data[80 * len(cards):80 * len(cards) + 80])
    return cards, start + -(-len(cards) * 80 // 2880) * 2880


def header(*cards, **values):
    """Return the bytes of a header."""
    lines = [f'{name:8}= {value}' for name, value in values.items()] + list(cards)
    text = b''.join(line.encode('latin-1').ljust(80) for line in [*lines, 'END'])
    return text.ljust(-(-len(text) // 2880) * 2880)


PRIMARY = {'SIMPLE': 'T', 'BITPIX': '16', 'NAXIS': '2', 'NAXIS1': '120', 'NAXIS2': '90'}
DATA = draw(n_channels=1, dtype=np.int16)[0].astype('>i2').tobytes().ljust(8 * 2880, b'\0')


# ---- pixels ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('dtype', 'n_channels'), [
    *((dtype, 3) for dtype in ('u1', 'u2', 'u4', 'u8', 'i1', 'i2', 'i4', 'i8', 'f4', 'f8')), ('u2', 1), ('f4', 1)])
def test_pixels_are_those_of_a_tiff(run, dtype, n_channels):
    sky, _ = draw(n_channels=n_channels, dtype=np.dtype(dtype))
    fits.writeto('sky.fits', planes(sky))
    tifffile.imwrite('sky.tif', sky, photometric='rgb' if n_channels == 3 else 'minisblack')
    for arguments in (['--dither', '--rows', '7'], ['--smooth', '0.1'], ['--divide', '--sky', 'color']):
        out = run('-b', 'b.fits', '--overwrite', *arguments)
        assert run.cli('-b', 'b.tif', '--overwrite', *arguments) == 0
        assert out.dtype.newbyteorder('=') == np.dtype(dtype)
        assert_array_equal(out, planes(tifffile.imread('out.tif').reshape(sky.shape)))
        assert_array_equal(fits.getdata('b.fits'), planes(tifffile.imread('b.tif').reshape(sky.shape)))


def test_rows_are_counted_as_stored(run):
    sky, _ = draw()
    points = scatter()
    mirrored = np.stack([points[:, 0], len(sky) - 1 - points[:, 1]], axis=1)
    fits.writeto('sky.fits', planes(sky))
    fits.writeto('mirrored.fits', planes(sky[::-1]), fits.Header({'ROWORDER': 'TOP-DOWN'}))
    out = run('--sky', '1000', points=['-p', *words(points)])
    assert 'y of points counts from the bottom row' in run.cli.stderr
    other = run('--sky', '1000', '--overwrite', name='mirrored.fits', points=['-p', *words(mirrored)])
    assert 'bottom row' not in run.cli.stderr
    assert np.abs(out.astype(int) - other[:, ::-1].astype(int)).max() <= 1  # sums in another order may round otherwise
    assert fits.getheader('out.fits')['ROWORDER'] == 'TOP-DOWN'


def test_floats_are_not_rescaled(run):
    sky, background = draw(dtype=np.float32)
    fits.writeto('sky.fits', planes(sky))
    out = run()
    assert 0.03 < np.median(out) < 0.08
    assert np.abs(out - planes(sky - background + np.median(out))).max() < 0.01


def test_nan_stays_and_is_no_data(run):
    sky, _ = draw(dtype=np.float32)
    sky[:, :12] = np.nan
    sky[40, 60] = np.nan
    fits.writeto('sky.fits', planes(sky))
    points = [(90, 26), (90, 63), (37, 65), (60, 65)]
    out = run(points=['-p', *words(points)])
    assert_array_equal(np.isnan(out), np.isnan(planes(sky)))
    run.cli.fails('-i', 'sky.fits', '-o', 'x.fits', points=['-p', *words([*points, (8, 60)])], match='border')
    sky[:, :40] = np.nan
    fits.writeto('sky.fits', planes(sky), overwrite=True)
    run.cli.fails('-i', 'sky.fits', '-o', 'x.fits', points=['-p', *words(points)],
                  match='point (37, 65) has data at only 38 % of the averaged area (24 pixels')


@pytest.mark.parametrize(('dtype', 'blank'), [('i2', -32768), ('u2', 32767), ('i4', 7), ('u1', 255)])
def test_blank_stays_and_is_no_data(run, dtype, blank):
    """BLANK is a value as stored: 65535 of unsigned numbers is 32767."""
    sky, _ = draw(n_channels=1, dtype=np.dtype(dtype))
    value = blank + (2**15 if dtype == 'u2' else 0)
    sky //= 1 if dtype == 'u1' else 32
    hole = np.zeros(sky.shape[:2], bool)
    hole[:, -10:], hole[:5, :5] = True, True
    sky[hole] = value
    primary = fits.PrimaryHDU(planes(sky))
    primary.header['BLANK'] = blank
    primary.writeto('sky.fits')
    points = ['-p', *words([(30, 30), (60, 60), (80, 30), (30, 60)])]
    assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--sky', str(0 if dtype == 'i4' else 100), points=points) == 0
    raw = fits.getdata('out.fits', do_not_scale_image_data=True)
    assert_array_equal(raw == blank, hole)  # no other pixel became it
    assert fits.getheader('out.fits')['BLANK'] == blank
    with rg.open_picture('sky.fits') as image:
        assert_array_equal(image.usable(slice(0, 90), slice(0, 120))[1], ~hole)
    if dtype == 'i2':
        with rg.open_picture('sky.fits') as image:
            places = rg.find_quiet_places(image, 15, 2.0)
            assert len(places) > 20
            assert places[:, 0].max() < 110


def test_blank_that_can_not_be_is_none(run):
    for blank in ('32768', '-32769', '1' + '0' * 20):
        (run.cli.folder / 'sky.fits').write_bytes(header(**PRIMARY, BLANK=blank) + DATA)
        assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--overwrite') == 0
    # Keywords of other kinds are not the standard's.
    (run.cli.folder / 'sky.fits').write_bytes(header('HIERARCH BZERO = 7', 'blank   = 3000', **PRIMARY) + DATA)
    assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--overwrite') == 0


def test_nothing_else_becomes_blank(run):
    y, x = np.mgrid[:90, :120]
    sky = np.rint(1000 + 10 * x + np.random.default_rng(1).normal(0, 10, x.shape)).astype(np.int16)
    sky[sky == 1500] = 1501
    sky[:10, :10] = 10  # dark, but data of no meaning
    for blank in (1500, 10):
        hdu = fits.PrimaryHDU(sky)
        hdu.header['BLANK'] = blank
        hdu.writeto('sky.fits', overwrite=True)
        points = ['-p', *words([(40, 30), (80, 60), (60, 26), (90, 40)])]
        assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '-b', 'b.fits', '--overwrite', '--sky', '30',
                       points=points) == 0
        for name in ('out.fits', 'b.fits'):
            raw = fits.getdata(name, do_not_scale_image_data=True)
            expected = (sky == blank) if name == 'out.fits' else np.zeros(sky.shape, bool)
            assert_array_equal(raw == blank, expected)
        assert 'became black' not in run.cli.stderr


def test_data_behind_the_array_are_kept(run):
    tail = bytes(range(250)) * 64
    (run.cli.folder / 'sky.fits').write_bytes((header(**PRIMARY, PCOUNT='8000') + DATA[:90 * 120 * 2] + tail).ljust(
        2880 * 15, b'\0'))
    run()
    assert tail in (run.cli.folder / 'out.fits').read_bytes()


def test_headers_behind_the_picture_may_be_anything(run):
    for cards in (['ZIMAGE  = abc'], ['BITPIX  = abc'], ["GROUPS  = 'abc"], ["XTENSION= IMAGE &%"]):
        bad = header("XTENSION= 'IMAGE   '", 'BITPIX  = 8', 'NAXIS   = 0', *cards)
        (run.cli.folder / 'sky.fits').write_bytes(header(**PRIMARY) + DATA + bad)
        assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--overwrite') == 0
        assert (run.cli.folder / 'out.fits').read_bytes().endswith(bad)


def test_everything_that_tiff_has(run):
    """Automatic points, a reference of the other format, several pictures."""
    sky = tifffile.imread(ROOT / 'test_data' / 'sky.tif')[:240, :360]
    fits.writeto('sky.fits', planes(sky))
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    cli = run.cli
    assert cli('-i', 'sky.fits', '-o', 'a.fits', '--save-points', 'a.txt', points=['-a']) == 0
    assert cli('-o', 'a.tif', '--save-points', 'b.txt', points=['-a']) == 0
    assert (cli.folder / 'a.txt').read_text().split()[2:] == (cli.folder / 'b.txt').read_text().split()[2:]
    assert_array_equal(fits.getdata('a.fits'), planes(tifffile.imread('a.tif')))
    assert cli('-i', 'sky.fits', '-o', 'r.fits', '--reference', 'a.tif', points=['-a']) == 0
    assert cli('-o', 'r.tif', '--reference', 'a.fits', points=['-a']) == 0
    assert_array_equal(fits.getdata('r.fits'), planes(tifffile.imread('r.tif')))
    (cli.folder / 'several').mkdir()
    assert cli('-i', 'sky.fits', 'sky.tif', '-o', 'several', points=['-f', 'a.txt']) == 0
    assert sorted(path.name for path in (cli.folder / 'several').iterdir()) == ['sky.fits', 'sky.tif']


# ---- headers and other data -----------------------------------------------------------------------------------------

RICH = ["OBJECT  = 'NGC 7000'           / a comment", 'EXPTIME =                300.0', 'EXPTIME =   3.0E2 / again',
        "LONGSTR = 'This is a string that is much longer than a card can hold and so &'",
        "CONTINUE  'goes on in the next one'", 'HIERARCH ESO INS LONG KEYWORD = 5', 'COMMENT  as you like it',
        'HISTORY stacked', "D\xc9CLIN  = 'not ASCII'", '', "ROWORDER= 'TOP-DOWN'", "MIXED   =   3 / 'quoted'",
        "DATE-OBS= '2026-11-25T00:00:00'"]


def test_cards_are_kept_byte_for_byte(run):
    stale = ['DATAMIN =  0', 'DATAMAX = 65535', "CHECKSUM= 'abc&'", "CONTINUE  'def'", "DATASUM = '1'"]
    (run.cli.folder / 'sky.fits').write_bytes(header(*RICH[:5], *stale, *RICH[5:], **PRIMARY) + DATA)
    assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '-b', 'b.fits') == 0
    for name, text in (('out.fits', 'background gradient removed'), ('b.fits', 'background gradient of the picture')):
        before, _ = cards_of(run.cli.folder / 'sky.fits')
        after, data = cards_of(run.cli.folder / name)
        old = [card for card in before[:-1] if not any(card == each.encode().ljust(80) for each in stale)]
        assert after[:-2] == old
        assert after[-2].decode() == f'HISTORY rmgradient {rg.__version__}: {text}'.ljust(80)
        assert (run.cli.folder / name).stat().st_size == data + len(DATA)


def test_long_headers(run):
    """One that ends at the end of a block, and one for which the new card needs a further block."""
    for n in range(28, 36):
        (run.cli.folder / 'sky.fits').write_bytes(header(*[f'COMMENT {i}' for i in range(n)], **PRIMARY) + DATA)
        out = run('--overwrite')
        assert out.shape == (90, 120)
        assert_array_equal(list(fits.getheader('out.fits')['COMMENT']), [str(i) for i in range(n)])


def test_headers_of_many_axes_are_read_once(run):
    """999 lengths behind 34000 comments: looking each up from the first card on took a quarter of a minute."""
    values = {**PRIMARY, 'NAXIS': '999'}
    lengths = [f'NAXIS{i:<3}= 1' for i in range(3, 1000)]
    comments = ['COMMENT'] * 34000
    begin = time.process_time()
    for _ in range(3):
        (run.cli.folder / 'sky.fits').write_bytes(header(*comments, *lengths, **values) + DATA)
        assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--overwrite') == 0
    assert time.process_time() - begin < 15


def test_values_that_are_undefined_or_records(run):
    """BLANK without a value is none; a string is no number, whatever astropy makes of it."""
    (run.cli.folder / 'sky.fits').write_bytes(header('BLANK   =', **PRIMARY) + DATA)
    run()
    refused(run, header('NAXIS   =', **{**PRIMARY, 'NAXIS': ''}) + DATA, 'NAXIS is None, not a whole number')
    refused(run, header("BZERO   = 'A: 0'", **PRIMARY) + DATA, "BZERO is 'A: 0', not a number")


def test_other_extensions_are_copied(run):
    sky, _ = draw()
    table = fits.BinTableHDU.from_columns([fits.Column('a', 'J', array=np.arange(1000))], name='CATALOG')
    fits.HDUList([fits.PrimaryHDU(), table, fits.ImageHDU(planes(sky), name='SCI'),
                  fits.ImageHDU(planes(sky)[0], name='WEIGHT')]).writeto('sky.fits', checksum=True)
    assert run.cli('-i', 'sky.fits', '-o', 'out.fits') == 0
    assert 'only the first of 2 pictures is corrected' in run.cli.stderr
    with fits.open('sky.fits') as before, fits.open('out.fits', checksum=True) as after:
        after.verify('exception')
        assert [hdu.name for hdu in after] == ['PRIMARY', 'CATALOG', 'SCI', 'WEIGHT']
        assert_array_equal(after['WEIGHT'].data, planes(sky)[0])
        assert_array_equal(after['CATALOG'].data['a'], np.arange(1000))
        assert 'CHECKSUM' in after['WEIGHT'].header
        assert 'CHECKSUM' not in after['SCI'].header
        assert before[1].header.tostring() == after[1].header.tostring()
        tifffile.imwrite('sky.tif', sky, photometric='rgb')
        assert run.cli('--overwrite') == 0
        assert_array_equal(after['SCI'].data, planes(tifffile.imread('out.tif')))


@pytest.mark.skipif(not shutil.which('fitsverify'), reason='needs fitsverify')
@pytest.mark.parametrize('dtype', ['u1', 'u2', 'i4', 'f4', 'f8'])
def test_fitsverify_finds_no_fault(run, dtype):
    sky, _ = draw(dtype=np.dtype(dtype))
    hdu = fits.PrimaryHDU(planes(sky))
    for text in ('OBJECT', 'HIERARCH ESO X'):
        hdu.header[text] = 'a' * 50
    hdu.header['LONGSTRN'] = 'OGIP 1.0'
    hdu.header['LONGSTR'] = 'b' * 150
    fits.HDUList([hdu, fits.ImageHDU(np.zeros((3, 3)))]).writeto('sky.fits')
    run('-b', 'b.fits')
    for name in ('out.fits', 'b.fits'):
        done = subprocess.run(['fitsverify', name], capture_output=True, text=True)
        assert 'found 0 warning(s) and 0 error(s)' in done.stdout, done.stdout


def test_file_without_padding_at_its_end(run):
    (run.cli.folder / 'sky.fits').write_bytes(header(**PRIMARY) + DATA[:90 * 120 * 2])
    run()
    assert (run.cli.folder / 'out.fits').stat().st_size == 2880 + len(DATA)


def test_trailing_axes_of_one_are_gray(run):
    for axes in ({'NAXIS': '3', 'NAXIS3': '1'}, {'NAXIS': '4', 'NAXIS3': '1', 'NAXIS4': '1'}):
        (run.cli.folder / 'sky.fits').write_bytes(header(**{**PRIMARY, **axes}) + DATA)
        assert run('--overwrite').shape == (*[1] * (int(axes['NAXIS']) - 2), 90, 120)


# ---- what is refused ------------------------------------------------------------------------------------------------

def refused(run, content, match, out='x.fits', **more):
    (run.cli.folder / 'bad.fits').write_bytes(content)
    line = run.cli.fails('-i', 'bad.fits', '-o', out, match=match, **more)
    assert 'bad.fits' in line or out in line
    assert len(line) < 250


@pytest.mark.parametrize(('values', 'match'), [
    ({'NAXIS': '3', 'NAXIS3': '7', 'NAXIS1': '12'}, 'a cube of 12 x 90 x 7; save one plane, or three'),
    ({'NAXIS': '4', 'NAXIS3': '1', 'NAXIS4': '3', 'NAXIS1': '40'}, 'a cube'),
    ({'NAXIS': '1'}, 'no picture in it'), ({'NAXIS': '0'}, 'no picture in it'), ({'NAXIS1': '0'}, 'no picture in it'),
    ({'NAXIS': '3', 'NAXIS3': '0'}, 'no picture in it'),
    ({'NAXIS1': '0', 'GROUPS': 'T'}, 'random groups'),
    ({'BSCALE': '0'}, 'BSCALE 0 and BZERO 0, so that nothing is left'), ({'BSCALE': '1E-320'}, 'nothing is left'),
    ({'BZERO': '1E30'}, 'nothing is left'),
    ({'BSCALE': "'one'"}, "damaged: BSCALE is 'one', not a number"),
    ({'BZERO': 'T'}, 'damaged: BZERO is True'), ({'BZERO': '1E999'}, 'damaged: BZERO is inf'),
    ({'BITPIX': '17'}, 'damaged: BITPIX is 17'), ({'BITPIX': "'16'"}, "damaged: BITPIX is '16', not a whole number"),
    ({'BITPIX': '16.5'}, 'damaged: BITPIX is 16.5'), ({'NAXIS': '1000'}, 'damaged'), ({'NAXIS': '-1'}, 'damaged'),
    ({'NAXIS1': '-120'}, 'damaged: negative sizes'), ({'NAXIS2': '900000000000'}, 'damaged: its data end at byte'),
    ({'NAXIS1': "'many'"}, "damaged: NAXIS1 is 'many'"), ({'NAXIS3': '5', 'NAXIS': '4'}, 'damaged: NAXIS4 is None'),
    ({'NAXIS2': '9' * 60}, 'damaged'), ({'BLANK': "'x'"}, "damaged: BLANK is 'x'"), ({'NAXIS': 'T'}, 'damaged'),
    ({'PCOUNT': '-1'}, 'negative'), ({'GCOUNT': '100000'}, 'damaged: its data end'),
    ({'SIMPLE': 'F'}, 'not a standard')])
def test_odd_headers(run, values, match):
    data = DATA if 'no picture' not in match else bytes(2880) if values == {'NAXIS': '1'} else b''
    refused(run, header(**{**PRIMARY, **values}) + data, match)


def test_damaged_files(run):
    good = header(**PRIMARY) + DATA
    refused(run, good[:2000], 'damaged: it ends at byte 2000')
    refused(run, good[:2880], 'damaged: its data end at byte')
    refused(run, good[:-6000], 'damaged: its data end at byte')
    refused(run, good.replace(b'END     ', b'ENE     '), 'damaged: it ends at byte')
    refused(run, good.replace(b'BITPIX', b'BITPOX'), 'damaged: BITPIX is None')
    refused(run, header(**{**PRIMARY, 'NAXIS': '0'}) + b'rubbish' * 1000, 'no header at byte 2880')
    with open(run.cli.folder / 'blanks.fits', 'wb') as file:  # a gigabyte of header, most of it a hole
        file.write(good[:400])
        file.truncate(10**9)
    assert run.cli('-i', 'blanks.fits', '-o', 'x.fits') == 1
    assert 'damaged: no END in 36000 cards' in run.cli.stderr
    (run.cli.folder / 'blanks.fits').unlink()
    refused(run, header(**{**PRIMARY, 'NAXIS': '0', 'EXTEND': 'T'}) + 200 * header(
        **{'XTENSION': "'IMAGE   '", 'BITPIX': '8', 'NAXIS': '0', 'PCOUNT': '0', 'GCOUNT': '1'}), 'no picture in it')


def test_random_damage_is_never_a_traceback(run):
    rng, good = np.random.default_rng(5), header(*RICH, **PRIMARY) + DATA
    for i in range(150):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(0, 2880 if i % 3 else 400))
            bad[at:at + 1] = bytes([rng.integers(0, 256) if i % 2 else rng.integers(32, 127)])
        (run.cli.folder / 'bad.fits').write_bytes(bad)
        assert run.cli('-i', 'bad.fits', '-o', 'out.fits', '--overwrite') in (0, 1)
        assert run.cli.stderr.count('error: ') <= 1


def unpacked_and_packed(folder, sky):
    """Write a FITS file, and the same packed by gzip and by fpack's compression."""
    fits.writeto('plain.fits', sky)
    (folder / 'zipped.fits.gz').write_bytes(gzip.compress((folder / 'plain.fits').read_bytes()))
    image = fits.CompImageHDU(sky, fits.Header([('OBJECT', "M42's")]), compression_type='RICE_1')
    fits.HDUList([fits.PrimaryHDU(), image]).writeto('packed.fits.fz')


@pytest.mark.parametrize(('dtype', 'n_channels'), [('u2', 1), ('i2', 3), ('i4', 1), ('u1', 3)])
def test_packed_files_are_read(run, dtype, n_channels):
    sky, _ = draw(n_channels=n_channels, dtype=np.dtype(dtype))
    unpacked_and_packed(run.cli.folder, planes(sky))
    for name in ('plain.fits', 'zipped.fits.gz', 'packed.fits.fz'):
        assert run.cli('-i', name, '-o', f'of_{name[:5]}.fits') == 0, run.cli.stderr
        assert_array_equal(fits.getdata(f'of_{name[:5]}.fits'), fits.getdata('of_plain.fits'))
    assert fits.getheader('of_packe.fits')['OBJECT'] == "M42's"
    with fits.open('of_packe.fits') as hdus:
        hdus.verify('exception')


def test_names_of_unpacked_outputs(run):
    unpacked_and_packed(run.cli.folder, planes(draw()[0])[0])
    for name in ('zipped.fits.gz', 'packed.fits.fz'):
        run.cli.fails('-i', name, '-o', 'out' + name[6:], match='is written as FITS, not compressed FITS; name it')
    (run.cli.folder / 'out').mkdir()
    (run.cli.folder / 'packed.fits.fz').rename(run.cli.folder / 'packed.fz')
    assert run.cli('-i', 'zipped.fits.gz', 'packed.fz', '-o', 'out') == 0
    assert sorted(path.name for path in (run.cli.folder / 'out').iterdir()) == ['packed.fits', 'zipped.fits']


def test_packed_files_that_lie_or_are_none(run):
    sky = planes(draw()[0])[0]
    unpacked_and_packed(run.cli.folder, sky)
    good = (run.cli.folder / 'zipped.fits.gz').read_bytes()
    refused(run, good[:-3000], 'damaged: it cannot be unpacked')
    refused(run, good[:3000] + bytes(200) + good[3200:], 'damaged: it cannot be unpacked')
    refused(run, gzip.compress(b'text'), 'a gzip file that has no FITS file in it; unpack it: gunzip bad.fits')
    refused(run, gzip.compress(bytes(10**8)), 'a gzip file that has no FITS file in it')
    packed = (run.cli.folder / 'packed.fits.fz').read_bytes()
    for old, new, match in ((b'ZNAXIS1 =                  120', b'ZNAXIS1 =           1200000000', 'packed into'),
                            (b'ZNAXIS2 =                   90', b'ZNAXIS2 =                  900', 'damaged'),
                            (b"ZCMPTYPE= 'RICE_1", b"ZCMPTYPE= 'RICE_7", 'damaged')):
        assert old in packed
        refused(run, packed.replace(old, new), match)


def test_packed_files_without_astropy(run, monkeypatch):
    unpacked_and_packed(run.cli.folder, planes(draw()[0])[0])
    find = rg.importlib.util.find_spec
    monkeypatch.setattr(rg.importlib.util, 'find_spec', lambda name: None if name == 'astropy' else find(name))
    run.cli.fails('-i', 'packed.fits.fz', '-o', 'x.fits',
                  match=f'packed.fits.fz: astropy is missing; run: {rg.how_to_install("astropy")}')
    assert run.cli('-i', 'zipped.fits.gz', '-o', 'x.fits') == 0


def test_packed_files_that_break_the_library(run):
    """Which writes beyond its memory: another process ends, and not ours."""
    sky = planes(draw()[0])[0].astype(np.int16)
    image = fits.CompImageHDU(sky, compression_type='HCOMPRESS_1')
    fits.HDUList([fits.PrimaryHDU(), image]).writeto('packed.fits.fz')
    packed = (run.cli.folder / 'packed.fits.fz').read_bytes()
    for old, new in ((b'ZTILE2  =                   16', b'ZTILE2  =                    4'),
                     (b'ZNAXIS2 =                   90', b'ZNAXIS2 =                    2'),
                     (b'TFIELDS =                    1', b'TFIELDS =           2147483648')):
        assert old in packed
        (run.cli.folder / 'bad.fits').write_bytes(packed.replace(old, new))
        assert run.cli('-i', 'bad.fits', '-o', 'x.fits', '--overwrite') in (0, 1)
        assert 'Traceback' not in run.cli.stderr


def test_blanks_of_64_bit_stay(run):
    for blank in (2**63 - 1, -(2**53) - 1):
        sky = np.full((90, 120), 10**6, np.int64) + np.random.default_rng(1).integers(0, 999, (90, 120))
        sky[50:55, 60:70] = blank
        hdu = fits.PrimaryHDU(sky)
        hdu.header['BLANK'] = blank
        hdu.writeto('sky.fits', overwrite=True)
        assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--overwrite') == 0
        assert_array_equal(fits.getdata('out.fits', do_not_scale_image_data=True) == blank, sky == blank)


def test_mask_lies_as_it_is_displayed(run):
    """FITS is shown from the bottom up: a mask drawn as a TIFF is turned over."""
    sky, _ = draw(n_channels=1)
    fits.writeto('sky.fits', planes(sky))
    mask = np.zeros((90, 120), np.uint8)
    mask[:40] = 255
    tifffile.imwrite('mask.tif', mask)
    fits.writeto('mask.fits', mask[::-1])
    points = ['-p', *words([(30, 28), (60, 26), (90, 30), (75, 27)])]  # near the bottom as displayed
    for name in ('mask.tif', 'mask.fits'):
        assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--mask', name, '--overwrite', points=points) == 0
        assert '44.4 % of the picture is masked' in run.cli.stderr
    scaled = fits.PrimaryHDU(np.full((90, 120), -100, np.int16))
    scaled.header['BZERO'] = 100.0
    scaled.writeto('zero.fits')
    assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--mask', 'zero.fits', '--overwrite', points=points) == 0
    assert 'the mask is 0 everywhere, and masks nothing' in run.cli.stderr


@pytest.mark.parametrize(('dtype', 'scale', 'zero'), [('i2', 0.02, 400.0), ('i2', -0.5, 9000.0), ('u1', 3.0, -20.0),
                                                      ('i4', 1.0, 7.0), ('f4', 0.5, 10.0), ('u1', -2.0, 600.0)])
def test_scaled_values(run, dtype, scale, zero):
    """Stored values are corrected; levels, division and limits are in physical units."""
    y, x = np.mgrid[:90, :120]
    sky = 200 + 1.5 * x + np.random.default_rng(1).normal(0, 3, x.shape)
    stored = (sky - zero) / scale
    stored = (stored if dtype == 'f4' else np.rint(stored)).astype(dtype)
    stored[5, 5] = blank = 17
    hdu = fits.PrimaryHDU(stored)
    hdu.header['BSCALE'], hdu.header['BZERO'] = scale, zero
    if dtype != 'f4':
        hdu.header['BLANK'] = blank
    hdu.writeto('sky.fits')
    physical = stored * float(scale) + zero
    points = ['-p', *words([(30, 30), (60, 60), (90, 30), (30, 60), (90, 60), (60, 28)])]
    for options, method in ((['--sky', '300'], 'subtract'), (['--sky', '250', '--divide'], 'divide')):
        assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '-b', 'b.fits', *options, '--overwrite', points=points) == 0
        assert f'sky level {options[1]}' in run.cli.stderr
        raw, background = (fits.getdata(name, do_not_scale_image_data=True).astype(float)
                           for name in ('out.fits', 'b.fits'))
        out, background = raw * scale + zero, background * scale + zero
        expected = physical - (background - 300) if method == 'subtract' else physical * 250 / background
        off = np.abs(out - expected)[np.indices(out.shape).sum(axis=0) != 10]
        # Rounding of the output, and of the background that is compared with, which counts twice to divide.
        assert off.max() <= (1e-3 if dtype == 'f4' else 1.6 * abs(scale))
        assert dtype == 'f4' or raw[5, 5] == blank
    run.cli.fails('-i', 'sky.fits', '-o', 'x.fits', '--sky', '1e300', points=points, match='a sky level of 1e+300 is')


def test_blank_at_the_limit_does_not_hide_what_became_black(run):
    """Limited to the value beside it, and counted."""
    for dtype, blank, level, color in (('u2', -32768, 500, 'black'), ('i2', 32767, 32300, 'white')):
        y, x = np.mgrid[:90, :120]
        sky = np.rint(1000 + 8.0 * x + np.random.default_rng(1).normal(0, 200, x.shape)).astype(dtype)
        hdu = fits.PrimaryHDU(sky)
        hdu.header['BLANK'] = blank
        hdu.writeto('sky.fits', overwrite=True)
        points = ['-p', *words([(30, 30), (60, 60), (90, 30), (30, 60)])]
        assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--sky', str(level), '--overwrite', points=points) == 0
        raw = fits.getdata('out.fits', do_not_scale_image_data=True)
        percent = 100 * (raw == blank + (1 if color == 'black' else -1)).mean()
        assert f'{rg.rounded(percent)} % of the pixels became {color}' in run.cli.stderr
        assert percent > 0.1
        assert not (raw == blank).any()


def test_picture_with_blank_comes_back_in_its_type(run):
    sky, _ = draw(n_channels=1)
    hdu = fits.PrimaryHDU(planes(sky))
    hdu.header['BLANK'] = 0
    hdu.writeto('sky.fits')
    with rg.open_picture('sky.fits') as picture:
        corrected = rg.remove_gradient(picture, run.cli.points)
    assert corrected.dtype == np.uint16
    assert run.cli('-i', 'sky.fits', '-o', 'out.fits') == 0
    assert_array_equal(planes(corrected), fits.getdata('out.fits'))


def test_raw_colors_are_refused(run):
    """Whose sublattices differ; gray pictures that have the keyword all the same are corrected."""
    y, x = np.mgrid[:90, :120]
    rng = np.random.default_rng(1)
    gray = 1000 + 3.0 * x + rng.normal(0, 12, x.shape)
    for keyword in ('BAYERPAT', 'COLORTYP', 'CFAPAT'):
        for color in (0, 30):
            sky = gray + color * ((x % 2 == 0) & (y % 2 == 0))
            fits.writeto('sky.fits', np.rint(sky).astype('u2'), fits.Header([(keyword, 'RGGB')]), overwrite=True)
            if color:
                run.cli.fails('-i', 'sky.fits', '-o', 'x.fits', match=f'sky.fits: raw colors of a color filter array '
                              f'({keyword} RGGB): debayer it first')
            else:
                assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--overwrite') == 0
    fits.writeto('sky.fits', np.rint(sky).astype('u2'), overwrite=True)
    assert run.cli('-i', 'sky.fits', '-o', 'out.fits', '--overwrite') == 0  # nothing says so


@pytest.mark.parametrize(('head', 'match'), [
    (b'\xff\xd8\xff\xe0', 'is a JPEG picture of 8 bits; save the original as TIFF or FITS, or run: '
     'convert bad.fits bad.tif'), (b'\x89PNG\r\n', 'a PNG'),
    (b'XISF0100', 'an XISF picture; save it as FITS or TIFF'), (b'II*\0\x10\0\0\0CR\2\0', 'a camera raw picture'),
    (b'\0\0\0\x18ftypcrx ', 'a camera raw'), (b'FUJIFILMCCD-RAW', 'a camera raw'), (b'8BPS\0\1', 'a Photoshop'),
    (b'\0\0\0\x18ftypheic', 'a HEIF'), (b'IIRO\x08', 'a camera raw'), (b'BZh91AY', 'bunzip2')])
def test_other_formats_are_named(run, head, match):
    refused(run, head.ljust(5000, b'\0'), match)


def test_output_is_of_the_format_of_the_input(run):
    sky, _ = draw()
    fits.writeto('sky.fits', planes(sky))
    for name in ('x.tif', 'x.TIFF', 'x.jpg', 'x.png', 'x.xisf', 'x.fits.gz'):
        run.cli.fails('-i', 'sky.fits', '-o', name, match=f'{name}: a FITS picture is written as FITS, not ')
    for name in ('x.fits', 'x.FIT', 'x.jpeg', 'x.psd'):
        run.cli.fails('-o', name, match=f'{name}: a TIFF picture is written as TIFF, not ')
        run.cli.fails('-b', name, match=f'{name}: a TIFF picture is written as TIFF, not ')
    for name in ('x.fts', 'x', 'x.1'):
        assert run.cli('-i', 'sky.fits', '-o', name) == 0
    run.cli.fails('-i', 'sky.fits', '-o', 'y.fits', '-c', '1', match='FITS is written without compression')


def test_nothing_of_astropy_is_loaded(run):
    (run.cli.folder / 'sky.fits').write_bytes(header(**PRIMARY) + DATA)
    points = ' '.join(map(str, np.ravel(run.cli.points)))
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rmgradient; "
            f"rmgradient.main('-q -i sky.fits -o x.fits -s 2 -p {points}'.split()); print('astropy' in sys.modules)")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=run.cli.folder)
    assert done.stdout == 'False\n'
    assert 'error: ' not in done.stderr


@pytest.mark.parametrize('text', [
    '                   T / yes', 'F', '  42', '-7 / seven', "'a''b  '", "'it / is' / no", '1.5E3', ' -2.5D-3 / d',
    '.5', '5.', '+3', "''", '/ undefined', '', '007', '1E5'])
def test_values_are_those_of_astropy(text):
    card = f'KEY     = {text}'.ljust(80)
    expected = pytest.importorskip('astropy.io.fits').Card.fromstring(card).rawvalue
    value = rg.parse_card(card.encode())
    if type(expected).__name__ == 'Undefined':
        expected = None
    assert value == expected
    assert type(value) is type(expected)



def test_what_is_read(run, monkeypatch):
    """Rows are read as they are needed, from several threads, whatever the size of the groups."""
    sky, _ = draw()
    fits.writeto('sky.fits', planes(sky))
    with rg.open_picture('sky.fits') as image:
        for start, left in itertools.product((0, 13), (0, 5)):
            assert_array_equal(image.read(start, start + 9, left, 50), sky[start:start + 9, left:50])
        results = [None] * 8

        def work(i):
            results[i] = image.read(i, 90 - i)
        workers = [threading.Thread(target=work, args=[i]) for i in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for i, rows in enumerate(results):
            assert_array_equal(rows, sky[i:90 - i])


def test_script_does_not_load_astropy_for_tiff(cli):
    code = 'import rmgradient, sys; rmgradient.main(sys.argv[1:]); sys.exit("astropy" in sys.modules)'
    command = [sys.executable, '-c', code, '-q', '-i', 'sky.tif', '-o', 'out.tif', '-p', *words(cli.points)]
    done = subprocess.run(command, env={'PYTHONPATH': str(ROOT), 'PATH': ''}, capture_output=True)
    assert done.returncode == 0


def test_gzip_files_that_never_end(run, monkeypatch):
    """A gzip file of a hundred gigabytes of zeros has a tenth of one."""
    import gzip
    monkeypatch.setattr(rg, 'LEAST_GZIPPED', 10**7)
    data = b'SIMPLE  =                    T'.ljust(2880) + bytes(4 * 10**7)
    (run.cli.folder / 'bomb.fits.gz').write_bytes(gzip.compress(data, 9))
    run.cli.fails('-i', 'bomb.fits.gz', '-o', 'out.fits', match='bomb.fits.gz: is more than 10000000 bytes')
