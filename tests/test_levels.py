# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
from helpers import draw, scatter
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import gaussian_filter, zoom

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
def test_plain_levels_are_those_of_a_blurred_frame(dtype, sigma):
    sky, _ = draw(height=230, dtype=np.dtype(dtype).newbyteorder('='))
    sky = sky.astype(dtype)
    points = rg.make_points(scatter(height=230, n=20, margin=12))
    levels = rg.measure_levels(sky, points, sigma, robust=False).levels
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
    assert_allclose(rg.measure_levels(sky, points, robust=False).levels[:, 0], blurred[points.y, points.x], rtol=1e-13)


def test_isoline_takes_the_level_of_its_leader():
    sky, _ = draw()
    points = rg.make_points([(30, 30), (-0.0, 0), (-119, 89), (60, 40), (-61, 41)])
    _, levels, noise, *_ = rg.measure_levels(sky, points)
    assert (levels[1:3] == levels[0]).all()
    assert (levels[4] == levels[3]).all()
    assert (levels[3] != levels[0]).all()
    assert noise.shape == levels.shape


def test_rows_read_together_do_not_matter(monkeypatch):
    sky, _ = draw(height=300)
    points = rg.make_points(scatter(height=300))
    _, levels, noise, *_ = rg.measure_levels(sky, points, robust=False)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(rg.row_groups, '__defaults__', (rows,))
        again = rg.measure_levels(sky, points, robust=False)
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


def holes(bad=np.nan, part=0.3):
    """Return a sky of 2 x 10^4 pixels of which a part is bad, float32, and the sky without holes."""
    sky, _ = draw(height=130, width=160, dtype=np.float32)
    whole = sky.copy()
    sky[np.random.default_rng(5).random(sky.shape[:2]) < part] = bad
    return sky, whole


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_level_is_the_weighted_mean_of_usable_pixels(bad):
    """Normalized convolution: blurred values over blurred weights."""
    sky, _ = holes(bad)
    points = rg.make_points(scatter(height=130, width=160))
    usable = np.isfinite(sky).all(axis=2)
    weight = gaussian_filter(usable.astype(float), 8, truncate=3.0)
    for c in range(3):
        blurred = gaussian_filter(np.where(usable, sky[..., c], 0).astype(float), 8, truncate=3.0) / weight
        levels = rg.measure_levels(sky, points, robust=False).levels[:, c]
        assert_allclose(levels, blurred[points.y, points.x], rtol=1e-12)


def test_point_with_less_than_half_of_its_weight_on_data_is_refused():
    sky = np.full((100, 100, 3), 1000.0)
    y, x = np.mgrid[-24:25, -24:25]
    weight = np.exp(-(x**2 + y**2) / 128)
    for n_columns, refused in ((24, False), (25, True)):  # the middle column has the last half
        sky[:] = 1000
        sky[:, 26:26 + n_columns, 1] = np.nan
        share = round(100 * weight[:, n_columns:].sum() / weight.sum())
        points = rg.make_points([(50, 50), (74, 24), (75, 75)])
        for robust in (True, False):
            if refused:
                with pytest.raises(rg.RmgradientError, match=rf'point \(50, 50\) has data at only {share} % of the '
                                                             r'averaged area \(24 pixels around it\); move it or'):
                    rg.measure_levels(sky, points, robust=robust)
            else:
                assert_allclose(rg.measure_levels(sky, points, robust=robust).levels, 1000)


def test_levels_have_no_stars_in_them():
    """The weighted mean of what lies within four deviations of the window's median; the plain one has all."""
    rng = np.random.default_rng(8)
    sky = rng.normal(1000, 10, (120, 120, 2))
    clean = sky.copy()
    y, x = np.mgrid[0:120, 0:120]
    for column, row in rng.uniform(30, 90, (12, 2)):
        sky += rng.uniform(100, 30000) * np.exp(-((x - column) ** 2 + (y - row) ** 2) / 5)[..., None] * [1.0, 0.4]
    points = rg.make_points([(60, 60), (40, 70), (70, 50)])
    robust, plain, expected = (rg.measure_levels(*some).levels for some in (
        (sky, points), (sky, points, 8, False), (clean, points)))
    assert np.abs(plain - expected).min() > 20
    # The foot of stars is left, which is below four deviations.
    assert (np.abs(robust - expected) < np.abs(plain - expected) / 15).all()
    window = sky[36:85, 36:85, 0]
    middle = np.median(window)
    kept = np.abs(window - middle) <= 4 * 1.4826 * np.median(np.abs(window - middle))
    weights = np.outer(rg.blur_kernel(8), rg.blur_kernel(8)) * kept
    assert_allclose(robust[0, 0], (weights * window).sum() / weights.sum(), rtol=1e-12)


def test_drawn_windows_without_scatter_lose_nothing():
    sky = np.full((100, 100, 1), 7, np.uint8)
    sky[50:, :] = 9  # a quarter of what each window averages, and no deviation
    sky[:, :60] = 7
    points = rg.make_points([(50, 50), (40, 30), (62, 60)])
    robust, plain = (rg.measure_levels(sky, points, robust=robust).levels for robust in (True, False))
    assert_allclose(robust, plain, rtol=1e-12)


@pytest.mark.parametrize('kind', ['independent', 'denoised', 'upsampled'])
def test_noise_counts_what_is_correlated(kind):
    """Against the scatter of levels of many skies of the same constant."""
    rng = np.random.default_rng(12)
    points = rg.make_points([(40 + 60 * i, 40 + 60 * j) for i in range(9) for j in range(9)])
    for _ in range(3):
        noise = rng.normal(0, 30, (560, 560))
        noise = {'independent': noise, 'denoised': gaussian_filter(noise, 3.0),
                 'upsampled': zoom(noise[::3, ::3], 3, order=1)[:560, :560]}[kind]
        measured = rg.measure_levels(1000 + noise[..., None], points)
        # 81 levels: their deviation is good to 8 %. Blocks of 7 pixels see half of what is denoised over as many.
        ratio = np.median(measured.noise) / measured.levels.std()
        assert (0.4 if kind == 'denoised' else 0.75) < ratio < 1.25


def test_large_windows_are_sampled():
    """Of 1441 x 1441 pixels every other one: the same level to the noise that is left."""
    rng = np.random.default_rng(13)
    sky = np.linspace(0, 500, 1500)[:, None, None] + rng.normal(1000, 20, (1500, 1500, 1))
    points = rg.make_points([(740, 740), (750, 760), (760, 745)])
    robust, plain = (rg.measure_levels(sky, points, 240.0, robust) for robust in (True, False))
    assert np.abs(robust.levels - plain.levels).max() < 5 * 20 / (2 * np.sqrt(np.pi) * 240 / 2)


# ---- which pixels can be measured -----------------------------------------------------------------------------------

def test_runs_without_data():
    """Rows of zeros, some of them long, some at a border, against each row looked at pixel by pixel."""
    rng = np.random.default_rng(4)
    for width in (1, 5, 31, 33, 64, 200):
        rows = rng.integers(1, 9, (60, width, 2))
        for row in rows:
            for _ in range(rng.integers(4)):
                start = rng.integers(-5, width)
                row[max(0, start):start + rng.integers(1, 40)] = 0
        rows[rng.random(rows.shape[:2]) < 0.05, 0] = 0  # in one channel
        expected = np.zeros((60, width), bool)
        for i, row in enumerate((rows == 0).all(axis=2)):
            edges = [0, *(np.flatnonzero(np.diff(row)) + 1), width]
            for start, stop in zip(edges, edges[1:]):
                expected[i, start:stop] = row[start] and (stop - start >= 32 or start == 0 or stop == width)
        for i, j in itertools.product(range(60), (0, -1)):  # single ones at the border
            beside = np.r_[False, expected[i], False][[0, 2] if j == 0 else [-3, -1]].any()
            around = [(rows[k, j] == 0).all() for k in (i - 1, i + 1) if 0 <= k < 60]
            expected[i, j] &= beside or any(around)
        for dtype in ('u2', 'f4'):
            _, usable = rg.as_picture(rows.astype(dtype)).usable(slice(0, 60), slice(0, width))
            assert_array_equal(usable, ~expected)
        # The same in windows of the picture, whose rows around them decide.
        picture = rg.as_picture(rows.astype('u2'))
        for _ in range(5):
            left = rng.integers(0, width)
            window = slice(7, 50), slice(left, rng.integers(left, width) + 1)
            assert_array_equal(picture.usable(*window)[1], ~expected[window])


def test_single_black_pixels_are_data():
    sky, _ = draw(height=130, width=160, n_channels=1)
    sky[40:45, 50:70] = 0
    points = rg.make_points([(60, 45), (100, 60), (40, 90)])
    assert_allclose(rg.measure_levels(sky, points, robust=False).levels[0, 0],
                    gaussian_filter(sky[..., 0].astype(float), 8, truncate=3.0)[45, 60], rtol=1e-13)
    sky[40:45, 50:90] = 0  # long
    assert rg.measure_levels(sky, points, robust=False).levels[0, 0] > 1.01 * gaussian_filter(
        sky[..., 0].astype(float), 8, truncate=3.0)[45, 60]
