# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
import tifffile
from helpers import correct, correction, draw
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import rmgradient as rg

INTEGERS = ['u1', 'u2', 'u4', 'u8', 'i1', 'i2', 'i4', 'i8']


def exact(image, shift, dtype):
    """Return image - shift rounded and limited in exact integers."""
    limits = np.iinfo(dtype)
    values = [int(i) - round(s) for i, s in zip(image.ravel().tolist(), shift.ravel().tolist())]
    limited = [min(max(value, limits.min), limits.max) for value in values]
    return np.array(limited, dtype).reshape(image.shape)


@pytest.mark.parametrize('dtype', INTEGERS)
def test_integers_never_wrap(dtype):
    limits = np.iinfo(dtype)
    span = min(float(limits.max) - float(limits.min), 2.0**50)
    rng = np.random.default_rng(4)
    image = rng.integers(limits.min, limits.max, (20, 7, 3), dtype, endpoint=True)
    image[0, :2] = [[limits.min], [limits.max]]
    for least, most in itertools.product((0.0, -0.4, -span / 3, -2 * span), (0.0, 3.0, span / 3, span, 3 * span)):
        shift = rng.uniform(least, most, image.shape)
        shift += 0.1 * (np.abs(shift % 1 - 0.5) < 0.05)  # no ties
        corrected = correct(image, shift)
        assert corrected.dtype == image.dtype
        # float64 tells integers of 64 bit to 2^10.
        off = corrected.astype(object) - exact(image, shift, dtype).astype(object)
        assert np.abs(off).max() <= (2**11 if np.dtype(dtype).itemsize == 8 else 0)


@pytest.mark.parametrize('dtype', ['f2', 'f4', 'f8'])
def test_floats_are_only_cast(dtype):
    image = np.array([[[0.5], [0.1], [np.nan], [np.inf], [-np.inf]]], dtype)
    corrected = correct(image, np.full(image.shape, 0.5))
    expected = np.array([[[0.0], [float(image[0, 1, 0]) - 0.5], [np.nan], [np.inf], [-np.inf]]]).astype(dtype)
    assert corrected.dtype == image.dtype
    assert_array_equal(corrected, expected)


@given(st.integers(0, 65535), st.floats(-70000, 70000))
def test_rounding_is_to_nearest(value, shift):
    image = np.full((1, 1, 1), value, np.uint16)
    corrected = correct(image, np.full((1, 1, 1), shift))
    assert abs(int(corrected[0, 0, 0]) - np.clip(value - shift, 0, 65535)) <= 0.5


@pytest.mark.parametrize('dtype', [*INTEGERS, 'f4'])
def test_pixels_that_became_black_or_white(dtype):
    limits = np.finfo(dtype) if dtype == 'f4' else np.iinfo(dtype)
    before = np.array([[[5, 5], [5, 6], [limits.min, 5], [limits.max, limits.max], [9, limits.max]]], dtype)
    after = np.array([[[limits.min, limits.min], [limits.min, limits.max], [limits.min, 5], [limits.max, 7],
                       [limits.max, limits.max]]], dtype)
    background = before.astype(float) - after
    if np.dtype(dtype).itemsize == 8:  # float64 does not tell the largest integers apart
        background = np.where(after == before, 0.0, np.where(after == limits.min, 1e30, -1e30))
        background[0, 3, 1] = limits.max / 4
    _, n_limited = correction(before, background).corrected_strip(rg.as_picture(before), 0, 1)
    assert n_limited.tolist() == ([2, 0] if dtype == 'f4' else [2, 2])  # floats: that left 0 ... 1


def test_background_keeps_within_its_dtype():
    values = np.array([-3.0, 0.4, 0.6, 254.6, 300.0])
    for dtype, expected in (('u1', [0, 0, 1, 255, 255]), ('f4', np.float32(values).tolist())):
        picture = np.zeros((1, 5, 1), dtype)
        strip, _ = correction(picture, values.reshape(1, 5, 1)).background_strip(rg.as_picture(picture), 0, 1)
        assert strip.dtype == dtype
        assert strip.ravel().tolist() == expected


def test_largest_integers_are_reached():
    shift = np.array([[[-1e30], [1e30]]])
    assert correct(np.ones((1, 2, 1), np.uint64), shift).ravel().tolist() == [2**64 - 2048, 0]
    assert correct(np.ones((1, 2, 1), np.uint32), shift).ravel().tolist() == [2**32 - 1, 0]


def test_input_is_not_changed():
    image, background = draw()
    copies = image.copy(), background.copy()
    correct(image, background)
    assert_array_equal(image, copies[0])
    assert_array_equal(background, copies[1])


# ---- divide, stretch and dither -------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['u1', 'u2', 'i2', 'u4', 'f4', 'f8'])
def test_divide_is_image_times_sky_over_background(dtype):
    image, background = draw(dtype=np.dtype(dtype))
    background, sky = np.abs(background) + 1, np.abs(background).min((0, 1)) + 1
    corrected = correct(image, background - sky, 'divide', sky)
    expected = image.astype(float) * sky / background
    # Rounded to an integer, or to the precision of floats.
    tolerance = 0.5 + 1e-9 if image.dtype.kind in 'ui' else 2 * np.finfo(dtype).eps
    assert np.abs(corrected - expected).max() <= tolerance
    darkest = background[..., 0] == background[..., 0].min()
    assert_array_equal(corrected[darkest][..., 0], image[darkest][..., 0])


@pytest.mark.parametrize('dtype', ['u1', 'u2', 'i2', 'u4', 'f4', 'f8'])
def test_stretch_keeps_white_white(dtype):
    white = 1.0 if np.dtype(dtype).kind == 'f' else np.iinfo(dtype).max
    image = np.full((2, 5, 3), white, dtype)
    image[1] = 0.4 * white
    shift = np.linspace(-0.2, 0.3, 30).reshape(2, 5, 3) * white
    corrected = correct(image, shift, 'stretch')
    assert_array_equal(corrected[0], image[0])
    expected = (image[1].astype(float) - shift[1]) * white / (white - shift[1])
    assert np.abs(corrected[1] - expected).max() <= (0.5 + 1e-9 if image.dtype.kind in 'ui' else 1e-7)
    assert corrected[0, 0].tolist() == [white] * 3


@pytest.mark.parametrize('dtype', ['u2', 'f4'])
def test_stretch_levels_the_sky(dtype):
    """Background becomes sky, white stays white, and between them the scale is even."""
    white = 1.0 if dtype == 'f4' else 65535
    background = np.linspace(0.05, 0.4, 300).reshape(1, 100, 3) * white
    sky = np.array([0.2, 0.1, 0.25]) * white
    image = np.concatenate([background, np.full((1, 100, 3), white), (background + white) / 2])
    corrected = correct(image.astype(dtype), background - sky, 'stretch', sky)
    expected = np.broadcast_to(np.stack([sky, [white] * 3, (sky + white) / 2])[:, None], image.shape)
    assert_allclose(corrected, expected, atol=1.5 if dtype == 'u2' else 1e-6)  # input and output are rounded


def test_stretch_refuses_what_it_cannot_keep():
    with pytest.raises(rg.RmgradientError, match='white has to be brighter than the background: it is 255'):
        correct(np.zeros((1, 1, 1), np.uint8), np.full((1, 1, 1), 255.0), 'stretch')
    nan = correct(np.full((1, 1, 1), np.nan), np.zeros((1, 1, 1)), 'stretch')
    assert np.isnan(nan).all()


def test_dither_noise_depends_on_picture_and_place_alone():
    image = np.zeros((50, 7, 3), np.uint8)
    one, other = (correction(image, np.zeros(image.shape), level=level, dither=True) for level in (7.0, 7.1))
    noise = one.dither_noise(0, 0, (50, 7, 3))
    assert_array_equal(np.concatenate([one.dither_noise(0, y, (10, 7, 3)) for y in range(0, 50, 10)]), noise)
    assert noise.min() >= -0.5
    assert noise.max() < 0.5
    for another in (one.dither_noise(1, 0, (50, 7, 3)), other.dither_noise(0, 0, (50, 7, 3))):
        assert abs(np.corrcoef(noise.ravel(), another.ravel())[0, 1]) < 4 / np.sqrt(noise.size)
    many = one.dither_noise(0, 0, (300, 300, 1))
    # Uniform over one: mean 0 and variance 1/12, both to four standard errors of 90000 values.
    assert abs(many.mean()) < 4 * np.sqrt(1 / 12 / many.size)
    assert abs(many.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / many.size)


def test_dither_of_stacked_pictures_averages_out():
    """Twenty frames of 8 bits: were their noise the same, the mean would keep all of it."""
    rng, errors = np.random.default_rng(9), []
    y, x = np.mgrid[0:90, 0:120]
    background = 100 + 0.05 * (x + y)[..., None]
    for _ in range(20):
        frame = np.rint(background + rng.normal(0, 2, background.shape)).astype(np.uint8)
        found = rg.find_correction(frame, [(30, 30), (90, 30), (60, 60)], dither=True)
        errors.append(found.apply(frame) - (frame - (found.model.evaluate(0, 90, 120) - found.sky)))
    # Dither and rounding leave sqrt(1/4) count at most in each; a stack of 20 keeps that over sqrt(20), 0.11.
    assert np.mean(errors, axis=0).std() < 0.15


@pytest.mark.parametrize('method', ['subtract', 'stretch', 'divide'])
def test_dither_keeps_means(method):
    image = np.full((200, 200, 1), 100, np.uint8)
    shift, sky = np.full(image.shape, 7.3), np.array([50.0])
    exact = correct(image.astype(float) / (255 if method == 'stretch' else 1),
                       shift / (255 if method == 'stretch' else 1), method,
                       sky / (255 if method == 'stretch' else 1))
    mean = exact[0, 0, 0] * (255 if method == 'stretch' else 1)
    dithered = correct(image, shift, method, sky, dither=True)
    # A value between two integers is the upper one by chance p: variance p (1 - p) <= 1/4.
    assert abs(dithered.mean() - mean) < 4 * np.sqrt(0.25 / image.size)
    assert abs(correct(image, shift, method, sky).mean() - mean) > 0.1


def test_dither_removes_bands():
    """An 8 bit gradient of three counts over 600 columns: steps without dither, a line with it."""
    shift = np.broadcast_to(np.linspace(0, 3, 600)[:, None], (400, 600, 1))
    image = np.full(shift.shape, 100, np.uint8)
    off = {dither: correct(image, shift, dither=dither).mean(axis=(0, 2)) - (100 - shift[0, :, 0])
           for dither in (False, True)}
    assert np.abs(off[False]).max() > 0.49
    # The mean of 400 values, of standard error 0.025.
    assert np.abs(off[True]).max() < 5 * 0.025
    assert np.abs(off[True][:100].mean()) < 4 * 0.0025


# ---- no data --------------------------------------------------------------------------------------------------------

def with_border(dtype, n_channels=3):
    """Return a sky with slanted borders, where it has no data, and the same without borders."""
    sky, _ = draw(n_channels=n_channels, dtype=np.dtype(dtype))
    y, x = np.mgrid[0:90, 0:120]
    empty = (x + y < 25) | (x - y > 95) | (y > 86)
    whole, sky[empty] = sky.copy(), 0
    if np.dtype(dtype).kind == 'f':
        sky[empty & (x > 60)] = np.nan
    sky[40, 60] = 0  # inside of the frame: data
    sky[50, 0, 1:] = 0  # in some of the channels: data
    if n_channels == 1:
        empty[50, 0] = False
    return sky, empty, whole


@pytest.mark.parametrize('dtype', [*INTEGERS, 'f2', 'f4', 'f8'])
@pytest.mark.parametrize('method', ['subtract', 'stretch', 'divide'])
def test_no_data_stays_as_it_is(dtype, method):
    sky, empty, whole = with_border(dtype)
    points, sigma = [(30, 30), (60, 20), (80, 45), (40, 70), (90, 70), (70, 75)], 2.0
    for dither in (False, True):
        found = rg.find_correction(sky, points, sigma=sigma, method=method, dither=dither)
        corrected = found.apply(sky)
        assert_array_equal(corrected[empty], sky[empty])
        full = sky.copy()
        full[empty] = whole[empty]
        assert_array_equal(corrected[~empty], found.apply(full)[~empty])
        _, n_limited = found.corrected_strip(rg.as_picture(sky), 0, 90)
        assert n_limited.sum() <= 3
    if method != 'divide':  # 0 times anything is 0
        assert (rg.remove_gradient(sky, points, sigma=sigma, method=method, sky=whole.max() // 2)[40, 60] != 0).any()


@pytest.mark.parametrize('rows', [1, 7, 100])
def test_single_black_pixels_at_the_border_are_data(rows):
    """But a black column is none, in whatever groups of rows it is read."""
    sky, _ = draw()
    black = np.zeros(sky.shape[:2], bool)
    black[20:61, -1] = black[33:35, 0] = True
    sky[black] = sky[70, 0] = sky[10, -1] = sky[69, -1] = 0
    corrected = rg.remove_gradient(sky, [(30, 30), (60, 26), (80, 45), (40, 60)], rows=rows, sky=20000)
    assert_array_equal((corrected == 0).all(axis=2), black)


def test_no_data_inside_of_the_frame_stays():
    """Gaps of a mosaic; short black rows are data."""
    sky, _ = draw(height=200, width=300)
    sky[90:120, 140:190] = sky[:40, 200:260] = 0
    sky[150:160, 100:120] = 0
    corrected = rg.remove_gradient(sky, 'auto', sky=20000)
    assert not corrected[90:120, 140:190].any()
    assert not corrected[:40, 200:260].any()
    assert (corrected[150:160, 100:120] > 0).all()


def test_what_stays_does_not_count_as_black(cli):
    sky = np.dstack([cli.sky, np.full((90, 120), 65535, np.uint16)])
    sky[60:, :, :3] = 30  # land
    sky[60:, :, 3] = 0
    tifffile.imwrite('sky.tif', sky, photometric='rgb', extrasamples=['unassalpha'])
    points = ['-p', *'30 26 60 30 90 26 75 35 45 33'.split()]
    assert cli(points=points) == 0
    assert 'became black' not in cli.stderr
    assert_array_equal(tifffile.imread('out.tif')[60:], sky[60:])
    assert (tifffile.imread('out.tif')[:60, :, :3] != sky[:60, :, :3]).any()
    assert cli('-m', '0.1', '--overwrite', points=points) == 0  # the classic way does not know of transparency
    assert (tifffile.imread('out.tif')[60:, :, :3] != 30).any()


def test_classic_way_knows_no_borders():
    """As the program before did, negative floats and all."""
    sky, empty, _ = with_border('f8')
    points = [(30, 30), (60, 20), (80, 45), (40, 70), (90, 70)]
    found = rg.find_correction(sky, points, sigma=2.0, smooth=0.1)
    corrected, background = found.apply(sky), found.model.evaluate(0, 90, 120)
    assert_array_equal(np.isnan(corrected), np.isnan(sky))
    expected = sky - (background - background.min(axis=(0, 1)))
    np.testing.assert_allclose(corrected, expected, rtol=0, atol=1e-9)
    again = rg.remove_gradient(sky, points, sigma=2.0, smooth=0.1, sky='gray')
    assert_array_equal(again[empty], sky[empty])


def test_background_that_its_type_can_not_hold(cli):
    """A plane that goes below zero beyond the points: the file of the background says so."""
    y, x = np.mgrid[0:90, 0:120]
    sky = np.rint(np.clip(20.0 * x - 400, 0, None)).astype(np.uint16)
    tifffile.imwrite('sky.tif', sky + np.uint16(1))
    points = ['-p', *'60 30 60 60 90 30 90 60 75 45'.split()]
    assert cli('-b', 'bg.tif', points=points) == 0
    count = (tifffile.imread('bg.tif') == 0).sum()
    assert f'warning: sky.tif: the background of {count} pixels does not fit in the type of the picture' in cli.stderr
    assert 1000 < count < 3000
    tifffile.imwrite('sky.tif', sky.astype(np.float32))
    assert cli('-b', 'bg.tif', '--overwrite', points=points) == 0
    assert 'beyond what integers' not in cli.stderr
