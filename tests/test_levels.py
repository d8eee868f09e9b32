# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from helpers import draw, scatter
from numpy.testing import assert_allclose
from scipy.ndimage import gaussian_filter

import rmgradient as rg


@pytest.mark.parametrize('sigma', [0.1, 1.0, 2.5, 8.0, 13.3])
def test_kernel(sigma):
    kernel = rg.blur_kernel(sigma)
    assert len(kernel) == 2 * np.ceil(3 * sigma) + 1
    assert_allclose(kernel.sum(), 1, rtol=1e-15)
    assert_allclose(kernel, kernel[::-1], rtol=0)


@pytest.mark.parametrize('sigma', [0, -1, 0.05, np.nan, np.inf, 1e5, '8', None])
def test_kernel_of_impossible_width(sigma):
    with pytest.raises(rg.RmgradientError, match='0.1 to 10000'):
        rg.measure_levels(np.ones((90, 90)), rg.make_points(scatter()), sigma)


@pytest.mark.parametrize('dtype', ['u1', 'u2', 'u4', 'i2', 'f4', 'f8', '>u2', '>f4'])
@pytest.mark.parametrize('sigma', [1.1, 4.0])
def test_levels_are_those_of_a_blurred_frame(dtype, sigma):
    sky, _ = draw(height=230, dtype=np.dtype(dtype).newbyteorder('='))
    sky = sky.astype(dtype)
    points = rg.make_points(scatter(height=230, n=20, margin=12))
    levels = rg.measure_levels(sky, points, sigma).levels
    radius = int(np.ceil(3 * sigma))
    for c in range(3):
        # Given the radius, since scipy's own rounds 3 sigma; it is 24 for both at the default of 8.
        blurred = gaussian_filter(sky[..., c].astype(float), sigma, radius=radius)
        # Two sums of some hundred terms in another order: rounding only.
        assert_allclose(levels[:, c], blurred[points.y, points.x], rtol=1e-13)


def test_default_is_scipys_blur_cut_at_three_sigma():
    sky, _ = draw(height=130, n_channels=1)
    points = rg.make_points(scatter(height=130))
    blurred = gaussian_filter(sky[..., 0].astype(float), 8, truncate=3.0)
    assert_allclose(rg.measure_levels(sky, points).levels[:, 0], blurred[points.y, points.x], rtol=1e-13)


def test_isoline_takes_the_level_of_its_leader():
    sky, _ = draw()
    points = rg.make_points([(30, 30), (-0.0, 0), (-119, 89), (60, 40), (-61, 41)])
    _, levels, noise, _ = rg.measure_levels(sky, points)
    assert (levels[1:3] == levels[0]).all()
    assert (levels[4] == levels[3]).all()
    assert (levels[3] != levels[0]).all()
    assert noise.shape == levels.shape


def test_rows_read_together_do_not_matter(monkeypatch):
    sky, _ = draw(height=300)
    points = rg.make_points(scatter(height=300))
    _, levels, noise, _ = rg.measure_levels(sky, points)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(rg.row_groups, '__defaults__', (rows,))
        again = rg.measure_levels(sky, points)
        assert (again.levels == levels).all()
        assert (again.noise == noise).all()


def test_noise_is_the_standard_error():
    rng = np.random.default_rng(3)
    points = rg.make_points(scatter(300, 300, 60))
    sky = 1000 + rng.normal(0, 50, (300, 300, 2))
    noise = rg.measure_levels(sky, points, 2.0).noise
    expected = 50 * (rg.blur_kernel(2.0) ** 2).sum()
    # About 4 pi sigma^2 = 50 independent pixels each, 60 points: the mean of the variances is good to 4 %.
    assert_allclose(np.sqrt((noise**2).mean(axis=0)), expected, rtol=0.12)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_bad_pixel_in_a_window_is_named(bad):
    sky = np.ones((100, 100, 3), np.float32)
    sky[40 + 24, 50 - 24, 1] = bad  # the corner of the window
    points = rg.make_points([(25, 25), (50, 40), (60, 60)])
    with pytest.raises(rg.RmgradientError, match=r'point \(50, 40\) has NaN or infinite pixels within 24'):
        rg.measure_levels(sky, points)
    sky[40 + 24, 50 - 24, 1] = 1
    sky[40 + 25, 50 - 24, 1] = bad  # just outside of the window of that point, and far from the others
    assert (rg.measure_levels(sky, rg.make_points([(25, 25), (50, 40), (70, 30)])).levels > 0.99).all()


def test_window_that_is_partly_without_data_is_an_error():
    sky = np.ones((100, 100, 3), np.uint16)
    sky[:, 76:] = 0
    places = [(25, 25), (50, 40), (40, 60)]
    assert (rg.measure_levels(sky, rg.make_points(places)).levels > 0.99).all()
    with pytest.raises(rg.RmgradientError, match=r'point \(52, 40\) has pixels without data within 24 pixels'):
        rg.measure_levels(sky, rg.make_points([*places, (52, 40)]))
    sky[:, 95:] = 1  # zeros inside of the frame are data
    assert rg.measure_levels(sky, rg.make_points([*places, (52, 40)])).levels.min() < 0.9999
    sky[:, 95:], sky[:, 76:, 0] = 0, 1  # and so are zeros in some of the channels
    assert rg.measure_levels(sky, rg.make_points([*places, (52, 40)])).levels[3].min() < 0.9999
