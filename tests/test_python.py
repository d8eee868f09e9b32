# SPDX-License-Identifier: Apache-2.0
"""The functions for notebooks and pipelines."""
import doctest
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from helpers import ROOT, draw, scatter
from numpy.testing import assert_array_equal

import rmgradient as rg


@pytest.mark.parametrize('options', [[], ['--divide'], ['--stretch'], ['--dither'], ['-s', '4', '-m', '0.1'],
                                     ['--sky', 'color'], ['--sky', '300'],
                                     ['--divide', '--dither']])
def test_function_does_what_the_command_does(cli, options):
    assert cli(*options) == 0
    method = 'divide' if '--divide' in options else 'stretch' if '--stretch' in options else 'subtract'
    more = {'sigma': 4.0, 'smooth': 0.1} if '-m' in options else {}
    if '--sky' in options:
        more['sky'] = 300 if '300' in options else options[1]
    more |= {'method': method, 'dither': '--dither' in options}
    assert_array_equal(rg.remove_gradient(cli.sky, cli.points, **more), tifffile.imread('out.tif'))
    found = rg.find_correction(cli.sky, cli.points, **more)
    assert found.model.evaluate(0, 90, 120).shape == cli.sky.shape
    # Any rows, given where they are in the frame.
    assert_array_equal(found.apply(cli.sky[37:61], start=37), tifffile.imread('out.tif')[37:61])
    assert found.points.centers.tolist() == cli.points.tolist()
    assert found.levels.shape == (12, 3)


@pytest.mark.parametrize('dtype', ['u1', '>u2', '>i2', 'f4', '>f8'])
@pytest.mark.parametrize('n_channels', [0, 1, 3])
def test_shape_and_type_are_kept(dtype, n_channels):
    sky, _ = draw(n_channels=max(1, n_channels), dtype=np.dtype(dtype).newbyteorder('='))
    sky = (sky if n_channels else sky[..., 0]).astype(dtype)
    before = sky.copy()
    corrected = rg.remove_gradient(sky, scatter(), rows=17)
    assert corrected.shape == sky.shape
    assert corrected.dtype == sky.dtype.newbyteorder('=')
    assert_array_equal(sky, before)
    again = rg.remove_gradient(sky.astype(corrected.dtype), rg.make_points(scatter()))
    # Other groups of rows: rounding, which integers do not show.
    np.testing.assert_allclose(corrected, again, rtol=0, atol=1e-12 if corrected.dtype.kind == 'f' else 0)


@pytest.mark.parametrize(('arguments', 'match'), [
    ({'image': np.zeros((90, 120), complex)}, 'is not a picture'), ({'image': np.zeros(90)}, 'is not a picture'),
    ({'image': np.zeros((0, 5))}, 'is not a picture'), ({'method': 'multiply'}, "'multiply' is not one of"),
    ({'sky': 'grey'}, "'grey', is neither a number"), ({'sky': [1, 2]}, '2 sky levels for a picture of 3 channels'),
    ({'sky': [[1]]}, 'neither'), ({'sky': ['a', 'b', 'c']}, 'neither'), ({'sky': np.nan}, 'neither'),
    ({'points': [(30, 30)]}, 'too few'), ({'sigma': -1}, 'from 0.1 to 10000'), ({'sigma': 20}, 'smaller sigma')])
def test_errors_are_values(arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        rg.remove_gradient(**({'image': draw()[0], 'points': scatter()} | arguments))
    assert isinstance(caught.value, rg.RmgradientError)


def test_points_may_be_chosen():
    sky = tifffile.imread(ROOT / 'test_data' / 'sky.tif')
    expected = rg.remove_gradient(sky, rg.choose_points(sky).points)
    assert_array_equal(rg.remove_gradient(sky, 'auto'), expected)
    with pytest.raises(rg.RmgradientError, match="'automatic', neither coordinates nor 'auto'"):
        rg.remove_gradient(sky, 'automatic')


def test_background_to_divide_by_is_positive(cli):
    y, x = np.mgrid[0:90, 0:120]
    sky = (x - 10.0)[..., None] * [1.0, 1.0, 1.0]
    with pytest.raises(rg.RmgradientError, match=r'the background is -10\S* at \(0, \d+\), so dividing by it'):
        rg.remove_gradient(sky, scatter(), method='divide')
    tifffile.imwrite('sky.tif', sky.astype(np.float32), photometric='rgb')
    cli.fails('--divide', match='error: sky.tif: the background is -10')


def test_stretch_of_bright_floats(cli):
    """The true largest value is named, wherever it is; values a little above white, and NaN, are no error."""
    sky = cli.sky.astype(np.float32)
    sky[80, 100] = 31000
    sky[0, 5] = np.inf
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    cli.fails('--stretch', match='sky.tif: there are values up to 31000, but white is 1; '
                                 'set white, for example to 65535')
    cli.fails('--stretch', '--divide', status=2, match='not allowed with')
    cli.fails('--stretch', '--white', '0', status=2, match="'0' is not a number from")
    assert cli('--stretch', '--white', '65535', '-b', 'b.tif', '-q') == 0
    out, background = tifffile.imread('out.tif'), tifffile.imread('b.tif')
    level = rg.find_correction(sky, cli.points).sky
    expected = level + (sky - background) * (65535 - level) / (65535 - background)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert_array_equal(rg.remove_gradient(sky, cli.points, method='stretch', white=65535), out)
    small = (cli.sky / cli.sky.max() * 1.05).astype(np.float32)
    assert rg.remove_gradient(small, cli.points, method='stretch').max() > 1
    with pytest.raises(rg.RmgradientError, match='values up to 1.2') as caught:
        rg.remove_gradient(small * np.float32(1.2 / 1.05), cli.points, method='stretch')
    assert '--' not in str(caught.value)


def test_stretch_needs_a_sky_darker_than_white():
    with pytest.raises(rg.RmgradientError, match='to stretch, the sky has to be darker than white, 3000'):
        rg.remove_gradient(draw()[0], scatter(), method='stretch', white=3000, sky=4000)


def test_mask_of_a_picture_is_for_one_call(cli):
    mask = np.zeros((90, 120), bool)
    mask[:, 60:] = True
    places = [(x, y) for x, y in cli.points.tolist() if x < 50][:3] + [(30, 30)]
    with rg.open_picture('sky.tif') as picture:
        rg.find_correction(picture, places[-1:] + [(35, 60), (40, 40)], mask=mask)
        assert picture.mask is None
        rg.find_correction(picture, cli.points)


def test_sky_of_each_channel():
    sky, _ = draw()
    corrected = rg.remove_gradient(sky, scatter(), sky=[2000, 3000, 4000])
    gray = rg.remove_gradient(sky, scatter(), sky=3000)
    assert_array_equal(corrected.astype(int) - gray, np.broadcast_to([-1000, 0, 1000], sky.shape))
    assert_array_equal(rg.remove_gradient(sky, scatter(), sky=np.array([2000, 3000, 4000])), corrected)


def test_correction_is_for_pictures_like_its_own():
    found = rg.find_correction(draw()[0], scatter())
    with pytest.raises(rg.RmgradientError, match='1 channels, and the correction is for 3'):
        found.apply(np.ones((90, 120)))


def test_unknown_setting_is_an_error():
    with pytest.raises(TypeError, match='smoth'):
        rg.remove_gradient(draw()[0], scatter(), smoth=0.1)


def test_paths_of_any_kind(cli):
    """A pathlib.Path works wherever a name does."""
    points = [word for pair in cli.points for word in map(str, pair)]
    assert rg.main(['-q', '-i', cli.folder / 'sky.tif', '-o', cli.folder / 'path.tif', '-p', *points]) == 0
    with rg.open_picture(cli.folder / 'sky.tif') as picture:
        assert_array_equal(rg.remove_gradient(picture, cli.points), tifffile.imread('path.tif'))


def test_open_picture_serves_as_an_array(cli):
    with rg.open_picture('sky.tif') as picture:
        corrected = rg.remove_gradient(picture, cli.points)
    assert_array_equal(corrected, rg.remove_gradient(cli.sky, cli.points))
    with pytest.raises(rg.RmgradientError, match='open_picture opens a file'):
        rg.remove_gradient('sky.tif', cli.points)


@pytest.mark.parametrize('points', [None, ['a', 'b'], [(1, 2), (3,)], [[None, 1]]])
def test_points_that_are_no_numbers(points):
    with pytest.raises(rg.RmgradientError, match='points'):
        rg.remove_gradient(draw()[0], points)


def test_importing_does_nothing():
    code = ('import signal, os, logging; before = signal.getsignal(2), dict(os.environ); import rmgradient; '
            'assert before == (signal.getsignal(2), dict(os.environ)); import gc; assert gc.isenabled(); '
            'assert not logging.getLogger("rmgradient").handlers')
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_examples_of_the_documentation(tmp_path, monkeypatch):
    """Each public function has one, and all of them run."""
    text = (ROOT / 'docs' / 'python.rst').read_text(encoding='utf-8')
    assert all(f'rmgradient.{name}' in text for name in rg.__all__ if name[0].islower())
    (tmp_path / 'test_data').symlink_to(ROOT / 'test_data')
    monkeypatch.chdir(tmp_path)
    options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    test = doctest.DocTestParser().get_doctest(text, {}, 'python.rst', None, 0)
    runner = doctest.DocTestRunner(optionflags=options)
    out = []
    runner.run(test, out=out.append)
    assert runner.summarize(verbose=False).attempted > 20
    assert runner.failures == 0, ''.join(out)


@pytest.mark.parametrize(('arguments', 'match'), [
    ({'smooth': -1}, "smoothness -1 is not 'auto' or a number from 0"), ({'smooth': 'none'}, 'smoothness'),
    ({'smooth': np.nan}, 'smoothness nan'), ({'sigma': 'x'}, "a blur of sigma 'x'"), ({'sky': -1}, 'sky level of -1'),
    ({'rows': 0}, 'rows are 0'), ({'rows': 2.5}, 'rows are 2.5'),
    ({'mask': np.zeros((90, 100))}, r'a mask of shape \(90, 100\) does not suit a picture of 90 x 120 pixels'),
    ({'white': -1}, 'white is -1, not a number above 0'),
    ({'image': np.moveaxis(draw()[0], 2, 0)}, r'channels first; pass np.moveaxis\(image, 0, -1\)')])
def test_options_are_checked(arguments, match):
    with pytest.raises(rg.RmgradientError, match=match) as caught:
        rg.remove_gradient(**({'image': draw()[0], 'points': scatter()} | arguments))
    assert '--' not in str(caught.value)


def masked_sky():
    """Return a sky with a bright nebula over a point, and where the nebula is."""
    sky, background = draw(height=200, width=300, noise=5.0)
    y, x = np.mgrid[0:200, 0:300]
    nebula = (x - 150) ** 2 + (y - 100) ** 2 < 50**2
    sky[nebula] += 5000
    return sky, background, nebula


def test_what_is_masked_is_not_measured_but_corrected():
    sky, background, nebula = masked_sky()
    chosen = rg.find_correction(sky, 'auto', mask=nebula)
    x, y = chosen.points.x, chosen.points.y
    assert not nebula[y, x].any()
    corrected = chosen.apply(sky)
    expected = sky - (background - chosen.sky)
    # The levels are good to a count, and the slope of the background to two over the frame; integers are rounded.
    assert np.abs(corrected - expected).max() < 5
    with pytest.raises(rg.RmgradientError, match=r'point \(150, 100\) is in the mask; move it, or change the mask'):
        rg.remove_gradient(sky, [(40, 40), (250, 40), (150, 100)], mask=nebula)
    # Points next to the mask are measured on what is not masked.
    places = [(40, 40), (250, 40), (40, 160), (250, 160), (210, 100), (90, 100)]
    near = rg.measure_levels(rg.as_picture(sky, nebula), rg.make_points(places))
    assert np.abs(near.levels - background[near.points.y, near.points.x]).max() < 20  # its middle is off by 3 pixels


@pytest.mark.parametrize('kind', ['ma', 'ma of one channel', 'CCDData'])
def test_masks_that_pictures_have(kind):
    sky, _, nebula = masked_sky()
    if kind == 'CCDData':
        nddata = pytest.importorskip('astropy.nddata')
        image = nddata.CCDData(sky, unit='adu', mask=np.repeat(nebula[..., None], 3, axis=2))
    else:
        mask = np.repeat(nebula[..., None], 3, axis=2)
        mask[..., 1:] &= kind == 'ma'
        image = np.ma.array(sky, mask=mask)
    expected = rg.remove_gradient(sky, 'auto', mask=nebula)
    corrected = rg.remove_gradient(image, 'auto')
    assert_array_equal(np.asarray(corrected), expected)
    if kind != 'CCDData':
        assert_array_equal(corrected.mask, image.mask)
    other = np.zeros_like(nebula)
    other[:50] = True
    both = rg.find_correction(image, 'auto', mask=other).points
    assert not (nebula | other)[both.y, both.x].any()


def test_units_are_refused():
    units = pytest.importorskip('astropy.units')
    with pytest.raises(rg.RmgradientError, match='an image with a unit would lose the unit; pass only the values'):
        rg.remove_gradient(draw()[0] * units.adu, scatter())


def test_gray_arrays_everywhere():
    sky = tifffile.imread(ROOT / 'test_data' / 'sky.tif')[..., 0]
    chosen = rg.choose_points(sky)
    _, levels, noise, *_ = rg.measure_levels(sky, chosen.points)
    assert levels.shape == noise.shape == (len(chosen.points.x), 1)
    assert_array_equal(levels, chosen.levels)
    assert_array_equal(rg.choose_points(sky[..., None]).points.x, chosen.points.x)
    assert rg.remove_gradient(sky, chosen.points, reference=sky).shape == sky.shape



# ---- odd arguments, and threads -------------------------------------------------------------------------------------

def test_pictures_are_like_arrays():
    with rg.open_picture(ROOT / 'test_data' / 'sky.tif') as picture:
        whole = np.asarray(picture)
        assert_array_equal(whole, tifffile.imread(ROOT / 'test_data' / 'sky.tif'))
        for window in (5, -1, np.s_[3, 4], np.s_[::7, 2:100:3], np.s_[1:3, -5:], np.s_[10:5], np.s_[2, ..., 1][:1],
                       np.s_[2:9, 3, 0], np.s_[:, :, 1]):
            assert_array_equal(picture[window], whole[window])
        assert len(picture) == 400
        assert len(list(picture)) == 400
        for bad in (1.5, 'a', None, np.s_[::-1]):
            with pytest.raises(rg.RmgradientError, match='a Picture takes'):
                picture[bad]
        with pytest.raises(IndexError):
            picture[400]


@pytest.mark.parametrize(('arguments', 'match'), [
    ({'sigma': '8'}, "a blur of sigma '8' is not a number"), ({'sky': 10**400}, 'the level of the sky'),
    ({'sky': np.ones((2, 2))}, 'the level of the sky'), ({'sky': [1j]}, 'the level of the sky'),
    ({'smooth': np.ones(2)}, 'smoothness'), ({'method': np.ones(2)}, 'method'), ({'method': 'substract'}, 'method'),
    ({'dither': np.ones(2)}, 'dither is'), ({'compress': 11}, 'compress is'), ({'auto': 2.5}, 'auto is')])
def test_odd_settings(arguments, match):
    sky, _ = draw()
    with pytest.raises(rg.RmgradientError, match=match):
        rg.remove_gradient(sky, scatter(), **arguments)


@pytest.mark.parametrize('points', [
    [[1 + 2j, 3], [4, 5], [6, 7]], rg.Points(np.zeros(3), np.zeros(3), np.arange(3)),
    rg.Points(np.arange(3), np.arange(3), np.array([5, 5, 5])), rg.Points(np.arange(3), np.arange(2), np.arange(3)),
    rg.Points(np.array([], int), np.array([], int), np.array([], int)), [[10**400, 1], [1, 2], [3, 4]],
    rg.Points('a', 'b', 'c')])
def test_odd_points(points):
    with pytest.raises(rg.RmgradientError):
        rg.remove_gradient(draw()[0], points)


def test_odd_starts():
    sky, _ = draw()
    correction = rg.find_correction(sky, scatter())
    for start in (-1, 0.5, '0', None, 10**12):
        with pytest.raises(rg.RmgradientError, match='not the number of a row'):
            correction.apply(sky, start=start)


def test_level_of_the_sky_as_an_array():
    sky, _ = draw()
    levels = [900, 950, 1000]
    one, other = (rg.remove_gradient(sky, scatter(), sky=level) for level in (levels, np.array(levels)))
    assert_array_equal(one, other)


def test_reference_is_an_open_picture_or_has_a_mask():
    from test_reference import pair
    frame, reference, _ = pair()
    picture = rg.as_picture(reference)
    assert_array_equal(rg.remove_gradient(frame, 'auto', reference=picture),
                       rg.remove_gradient(frame, 'auto', reference=reference))
    mask = np.zeros(reference.shape[:2], bool)
    mask[:, :150] = True
    found = rg.find_correction(frame, 'auto', reference=np.ma.array(reference, mask=np.dstack([mask] * 3)))
    assert found.points.x.min() >= 148


def test_threads_of_the_caller_leave_blas_as_it_was():
    from concurrent.futures import ThreadPoolExecutor

    import threadpoolctl
    before = [each['num_threads'] for each in threadpoolctl.threadpool_info()]
    sky, _ = draw()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda smooth: rg.remove_gradient(sky, scatter(), smooth=smooth), ['auto', 0.1] * 8))
    assert [each['num_threads'] for each in threadpoolctl.threadpool_info()] == before
    for i, result in enumerate(results):
        assert_array_equal(result, results[i % 2])
