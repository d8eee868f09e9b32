# SPDX-License-Identifier: Apache-2.0
"""Points that are chosen, points that are saved, and the preview."""
import contextlib
import functools
import itertools
import re
import sys

import numpy as np
import pytest
import tifffile
from helpers import correction, draw, fit
from matplotlib.image import imread
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import gaussian_filter
from scipy.stats import chi2

import rmgradient as rg

HEIGHT, WIDTH = 600, 900


def sky_with(*arguments, **more):
    """Return copies of what `draw_sky` draws once."""
    return [part.copy() for part in draw_sky(*arguments, **more)]


@functools.lru_cache
def draw_sky(nebula=0.0, glow=2000.0, border=False, seed=11, n_channels=3):
    """Return a uint16 sky of a dome, stars and noise, its background, and the light of a nebula in a quarter of it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    dome = np.exp(-((x + 100) ** 2 + (y - 700) ** 2) / (2 * 500.0**2))
    background = 1500 + glow * dome[..., None] * np.linspace(1, 0.7, n_channels)
    light = nebula * np.clip(1 - ((x - 480) / 270) ** 2 - ((y - 290) / 160) ** 2, 0, None) ** 0.7
    sky = background + rng.normal(0, 50, background.shape) + light[..., None] * np.linspace(1, 0.3, n_channels)
    for row, column, flux in zip(rng.integers(0, HEIGHT, 400), rng.integers(0, WIDTH, 400), 800 * rng.pareto(1.1, 400)):
        rows, columns = slice(max(row - 8, 0), row + 9), slice(max(column - 8, 0), column + 9)
        r2 = (y[rows, columns] - row) ** 2 + (x[rows, columns] - column) ** 2
        sky[rows, columns] += min(flux, 65535) * np.exp(-r2 / 4)[..., None]
    if border:
        sky[:70] = sky[:, :55] = 0
    return np.clip(np.rint(sky), 0, 65535).astype(np.uint16), background, light


def error_of(points, sky, background):
    """Return the largest RMS error of a channel of the model through the points, its mean error removed."""
    model = rg.fit_background(rg.measure_levels(sky, points)).model
    at_grid = model.at_grid(np.arange(0, WIDTH, 9), np.arange(0, HEIGHT, 9))  # smooth: more pixels tell no more
    return (at_grid - background[::9, ::9]).std(axis=(0, 1)).max()


@pytest.mark.parametrize(('case', 'most'), [({}, 5), ({'glow': 16000.0}, 20), ({'n_channels': 1}, 5),
                                            ({'glow': 16000.0, 'nebula': 1500.0}, 60), ({'border': True}, 20),
                                            ({'glow': 24000.0, 'nebula': 800.0, 'seed': 5}, 20)])
def test_chosen_points_give_the_background(case, most):
    sky, background, _ = sky_with(**case)
    measured = rg.choose_points(sky)
    points, n_places = measured.points, measured.chosen.n_places
    assert 40 < len(points.x) <= n_places <= 15 * 10 + 2 * (15 + 10)  # cells, and the border's own
    assert error_of(points, sky, background) < most  # the goals: counts of a noise of 50


def test_nebula_is_avoided_and_the_glow_is_not():
    sky, _, light = sky_with(glow=16000.0, nebula=1500.0)
    points = rg.choose_points(sky).points
    assert (light[points.y, points.x] > 100).sum() == 0
    assert points.x.min() < 100  # the brightest corner of the glow
    assert points.y.max() > HEIGHT - 100


def test_black_borders_saturated_cores_and_holes_are_avoided():
    sky, _, _ = sky_with(border=True)
    sky[300:400, 500:600] = 65535
    points = rg.choose_points(sky).points
    assert not any((sky[y - 12:y + 13, x - 12:x + 13] == 0).any() for x, y in zip(points.x, points.y))
    assert not (sky[points.y, points.x] == 65535).any()
    holes = sky.astype(np.float32)
    holes[sky == 0] = np.nan
    holes[500, 700] = np.inf
    points = rg.choose_points(holes).points
    assert all(np.isfinite(holes[y - 24:y + 25, x - 24:x + 25]).mean() > 0.7 for x, y in zip(points.x, points.y))


@pytest.mark.parametrize('edge', [*range(788, 820, 3), 876, 899])
def test_windows_that_are_offered_are_never_refused(edge):
    """Rows and columns of NaN or zeros from anywhere: what -a offers, measure_levels takes."""
    sky, _, _ = sky_with(n_channels=1)
    sky = np.rot90(sky).astype(np.float32)  # 900 x 600
    sky[edge:] = np.nan
    sky[:, :edge - 780] = 0
    y, x = np.mgrid[0:900, 0:600]
    sky[x + y < edge - 600] = 0
    places = rg.find_quiet_places(rg.as_picture(sky), 15, 8.0)
    assert len(places) > 90
    rg.measure_levels(sky, rg.make_points(places))


@pytest.mark.parametrize('part', [0.005, 0.03])
def test_scattered_holes_cost_nothing(part):
    sky, background, _ = sky_with()
    holed = sky.astype(np.float32)
    holed[np.random.default_rng(2).random((HEIGHT, WIDTH)) < part] = np.nan
    errors = [error_of(rg.choose_points(each).points, each, background) for each in (sky, holed)]
    assert errors[1] < errors[0] + 0.02 * 50  # of the noise of a pixel


def test_borders_of_some_channels_and_transparent_pixels_are_avoided(tmp_path):
    sky, _, _ = sky_with()
    sky[:, :100, 1:] = 0
    sky[:50, :, 0] = 0
    alpha = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    alpha[300:400, 500:700] = 0
    tifffile.imwrite(tmp_path / 'a.tif', np.concatenate([sky, alpha], axis=2), photometric='rgb',
                     planarconfig='contig', extrasamples=[2])
    with rg.TiffImage(tmp_path / 'a.tif') as image:
        places = rg.find_quiet_places(image, 15, 8.0)
    x, y = places.T
    assert len(places) > 90
    assert not ((x > 512) & (x < 688) & (y > 312) & (y < 388)).any()
    points = rg.choose_points(sky).points
    assert points.x.min() >= 95
    assert points.y.min() >= 45


def test_type_and_scale_of_the_picture_do_not_matter():
    sky = (sky_with()[0] // 257).astype(np.uint8)
    sky[100:130, 100:130] = 255  # saturated
    points = rg.choose_points(sky).points
    background = rg.fit_background(rg.measure_levels(sky, points)).model.evaluate(0, HEIGHT, WIDTH)
    for other, scale in [(sky.astype(np.uint16) * 257, 257), (sky / np.float32(255), 1 / 255),
                         (sky.astype(np.int32) * 65536, 65536)]:
        again = rg.choose_points(other).points
        assert_array_equal(again.x, points.x)
        assert_array_equal(again.y, points.y)
        model = rg.fit_background(rg.measure_levels(other, again)).model
        # float32 has 24 bits: 6e-8 of 255.
        assert_allclose(model.evaluate(0, HEIGHT, WIDTH) / scale, background, rtol=0, atol=1e-4)


def test_choice_does_not_depend_on_threads_and_scale():
    sky, _, _ = sky_with()
    points = rg.choose_points(sky).points
    picture = rg.as_picture(sky)
    with rg.threads(lambda results, *_: results) as picture.starmap:
        again = rg.choose_points(picture).points
    scaled = rg.choose_points(sky.astype(np.float64) / 65536).points
    for other in (again, scaled):
        assert_array_equal(other.x, points.x)
        assert_array_equal(other.y, points.y)


@pytest.mark.parametrize('n', [5, 10, 20])
def test_number_of_points(n):
    sky, background, _ = sky_with()
    measured = rg.choose_points(sky, n)
    points, n_places = measured.points, measured.chosen.n_places
    rows = n * 2 // 3 + 1
    assert n_places <= n * rows + 2 * (n + rows) + 4
    assert len(points.x) > 0.6 * n_places
    assert error_of(points, sky, background) < 25


def test_others_are_predicted_as_if_left_out():
    """A point left out of a fit and predicted by it: the error of the leave-one-out formula, and its deviation."""
    rng = np.random.default_rng(13)
    centers = rng.uniform(0, 900, (40, 2))
    levels = np.sin(centers / 300) + rng.normal(0, 0.1, (40, 2))
    points = rg.Points(*centers.T, np.arange(40))
    sites = rg.Sites(points, levels, np.ones(2), np.zeros(40, bool), np.array([900, 900]), 60.0)
    model = rg.choose_model(points, levels)
    for i in range(5):
        errors, deviation = rg.predict_others(model, sites, np.arange(40) != i)
        assert_allclose(errors[0], model.errors[i], rtol=1e-6)
        assert_allclose(errors[0] / deviation[0], model.standardized[i], rtol=1e-6)


@pytest.mark.parametrize('dtype', ['u1', 'f4'])
@pytest.mark.parametrize('slope', [0, 0.1])
@pytest.mark.parametrize('stars', [0, 30])
def test_drawn_skies_without_noise(dtype, slope, stars):
    """Deviations that are zero divide: no warning of numpy's, and points that are right."""
    y, x = np.mgrid[0:300, 0:400]
    sky = 100 + slope * x
    for row, column in np.random.default_rng(3).integers(0, 300, (stars, 2)):
        sky = np.where((y - row) ** 2 + (x - column) ** 2 < 9, 250, sky)
    sky = (sky if dtype == 'f4' else np.rint(sky)).astype(dtype)[..., None]
    measured = rg.choose_points(sky, sigma=2)
    points, n_places = measured.points, measured.chosen.n_places
    assert 100 < len(points.x) <= n_places
    corrected = rg.remove_gradient(sky, points, sigma=2)[sky < 200].astype(float)
    # Integers: the picture and the output are rounded, and levels on its steps are off by up to half a count.
    assert np.ptp(corrected) <= (1e-4 if dtype == 'f4' else 2)


@pytest.mark.parametrize('turned', [False, True])
def test_places_on_a_line(turned):
    """A picture so narrow that no slope across it can be known."""
    y, x = np.mgrid[0:60, 0:2500]
    sky = 1000 + 0.5 * x + np.random.default_rng(1).normal(0, 10, x.shape)
    sky += 3000 * np.exp(-(((x - 1200) / 150) ** 2)) + 2000 * np.exp(-(((x - 200) / 90) ** 2))
    sky = np.rint(sky).astype(np.uint16)[..., None]
    measured = rg.choose_points(sky.transpose(1, 0, 2) if turned else sky, 30)
    points, n_places = measured.points, measured.chosen.n_places
    assert set((points.x if turned else points.y).tolist()) <= {29, 30}  # on the calmer side of the middle
    along = points.y if turned else points.x
    assert 8 <= len(along) < n_places
    assert (np.abs(along - 1200) > 150).all()


@pytest.mark.parametrize(('picture', 'match'), [
    (np.zeros((200, 300, 3), np.uint16), 'too few quiet places with data, 0'),
    (np.full((200, 300, 1), np.nan, np.float32), 'too few quiet places with data, 0'),
    (np.ones((40, 300, 3), np.uint16), 'too few quiet places with data, 0'),
    (np.random.default_rng(1).integers(0, 99, (90, 90, 1), np.uint16), 'too few quiet places with data')])
def test_too_few_places(picture, match):
    with pytest.raises(rg.RmgradientError, match=match):
        rg.choose_points(picture)


# ---- the rules ------------------------------------------------------------------------------------------------------

Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]


def clouds(seed):
    """Return a gray uint16 sky of domes and clouds of many sizes, and its background."""
    rng = np.random.default_rng(seed)
    background = np.full((HEIGHT, WIDTH), 1500.0)
    for _ in range(rng.integers(1, 3)):
        angle = rng.uniform(0, 2 * np.pi)
        x, y = 450 + 650 * np.cos(angle), 300 + 450 * np.sin(angle)
        strength = np.exp(rng.uniform(np.log(500), np.log(15000)))
        background += strength * np.exp(-((X - x) ** 2 + (Y - y) ** 2) / (2 * rng.uniform(200, 500) ** 2))
    light = np.zeros_like(background)
    for _ in range(rng.integers(1, 4)):
        x, y, r = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(60, 250)
        strength = np.exp(rng.uniform(np.log(100), np.log(2000)))
        distance = ((X - x) ** 2 + (Y - y) ** 2 * rng.uniform(0.5, 2)) / (2 * r**2)
        light += strength * np.exp(-(distance ** rng.uniform(0.7, 2)))
    if rng.random() < 0.3:  # dust
        light -= 0.5 * light.max() * np.exp(
            -((X - rng.uniform(0, WIDTH)) ** 2 + (Y - rng.uniform(0, HEIGHT)) ** 2) / (2 * 120**2))
    sky = background + light + rng.normal(0, 50, light.shape)
    return np.clip(np.rint(sky), 0, 65535).astype(np.uint16)[..., None], background[..., None]


def amplifier(seed):
    """Return a gray uint16 sky of a plane and an amplifier's glow in a corner, and its background."""
    rng = np.random.default_rng(seed)
    background = 2000 + 0.8 * X - 0.5 * Y + 1200 * np.exp(-np.hypot(X, Y) / (rng.uniform(0.06, 0.15) * WIDTH))
    return np.rint(background + rng.normal(0, 50, X.shape)).astype(np.uint16)[..., None], background[..., None]


def filled(seed):
    """Return a gray uint16 sky full of nebula, and its background."""
    return nebula_all_over(seed)[:2]


def galaxy(seed):
    """Return a gray uint16 sky of a plane that a galaxy fills, and its background."""
    rng = np.random.default_rng(seed)
    background = 2000 + rng.uniform(-1, 1) * X + rng.uniform(-1, 1) * Y
    r = np.hypot((X - rng.uniform(350, 550)) / 1.5, Y - rng.uniform(250, 350))
    arms = 1 + 0.3 * np.sin(r / 20 + 2 * np.arctan2(Y - 300, X - 450))
    sky = background + 3000 * np.exp(-r / rng.uniform(80, 160)) * arms + rng.normal(0, 30, X.shape)
    return np.rint(sky).astype(np.uint16)[..., None], background[..., None]


def lamp(seed):
    """Return a gray uint16 sky of a plane and a steep glow in a corner, wherever that is, and its background."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 2, 2) * [WIDTH, HEIGHT]
    glow = rng.uniform(80, 600) * np.exp(-np.hypot(X - x, Y - y) / rng.uniform(60, 140))
    background = 1000 + 0.1 * X + glow
    return np.rint(background + rng.normal(0, 10, X.shape)).astype(np.uint16)[..., None], background[..., None]


def edge(seed):
    """Return a gray uint16 sky that falls off at an edge, and its background."""
    rng = np.random.default_rng(seed)
    distance, width = [X, WIDTH - 1 - X, Y, HEIGHT - 1 - Y][seed % 4], rng.uniform(45, 75)
    background = (1000 + 0.1 * Y) * (1 - rng.uniform(0.06, 0.16) * np.clip((width - distance) / width, 0, 1) ** 2)
    return np.rint(background + rng.normal(0, 10, X.shape)).astype(np.uint16)[..., None], background[..., None]


def starry(seed):
    """Return a sky of a steep dome and stars, and its background."""
    return sky_with(glow=16000.0, seed=seed)[:2]


def nothing(sky, sites):
    return np.zeros(len(sky), bool)


@functools.lru_cache
def drawn_with_error(draw, seed):
    """Return a sky, its background, and the error of what is chosen in it."""
    sky, background = draw(seed)
    return sky, background, error_of(rg.choose_points(sky).points, sky, background)


@pytest.mark.parametrize(('draw', 'seed', 'rule', 'without', 'times'), [
    (filled, 8, 'rims', nothing, 3), (starry, 4, 'CORNER', 0, 1.2), (lamp, 12, 'ROUGH', 0.0, 2),
    (galaxy, 35, 'MOST_END', 1.0, 3), (clouds, 46, 'BELOW', 1e9, 1.08), (starry, 6, 'GROUP', 1, 1.25),
    (clouds, 1, 'leave_faint_ends', lambda followed, _: followed.is_sky, 1.3), (lamp, 9, 'STANDS_OUT', 1e9, 1.2),
    (starry, 13, 'JOINS', 0.0, 1.2), (clouds, 44, 'DROPPED', 8.0, 1.3), (starry, 4, 'DROPPED', 3.0, 2),
    (clouds, 29, 'DEGREES', range(1, 5), 3), (clouds, 0, 'LEAST_VARIANCE', 0.01, 1.2),
    (galaxy, 6, 'WEIGHT_ABOVE', 0.3, 1.5), (galaxy, 6, 'LOWEST', 0.9, 3), (galaxy, 6, 'PLANAR', 0.0, 3),
    (filled, 3, 'MOST_SCATTER_OF_ALL', 1e9, 5),
    (starry, 14, 'SMOOTH', 0.5, 1.3), (edge, 0, 'FALLS', 2.0, 3), (lamp, 13, 'GLOW_LEFT', 0.0, 3)])
def test_each_rule_is_needed(monkeypatch, draw, seed, rule, without, times):
    """Without it, the same sky comes out worse."""
    sky, background, error = drawn_with_error(draw, seed)
    monkeypatch.setattr(rg, rule, without)
    assert error_of(rg.choose_points(sky).points, sky, background) > times * error


def sites_of(levels):
    """Return Sites on a grid whose levels, in noises, are a function of -1 ... 1 in x and y."""
    x, y = (each.ravel() for each in np.meshgrid(np.arange(30, 900, 60), np.arange(30, 600, 60)))
    points = rg.Points(x, y, np.arange(len(x)))
    values = levels(x / 450 - 1, y / 300 - 1)[:, None]
    return rg.Sites(points, values, np.ones(1), np.zeros(len(x), bool), np.array([WIDTH, HEIGHT]), 60.0)


def test_lower_sky_is_a_plane_or_a_cubic():
    """Under clouds that shine: a cubic only where the glow is far from a plane."""
    rng = np.random.default_rng(3)
    light = 30 * np.maximum(rng.normal(size=150), 0)
    for bend, shape in ((0, 3.0), (30, 3.0), (3000, 0.8)):
        sites = sites_of(lambda x, y, bend=bend: 500 * x - 300 * y + bend * (x**2 + x * y**2) + light)
        sky = rg.lower_sky(sites)
        assert sky.least_shape == shape * WIDTH
        assert not sky.agree
        assert sky.is_sky.sum() == 38  # a quarter
        assert np.median(light[sky.is_sky]) < (1 if bend != 30 else 10)


def test_asymmetric_least_squares_are_expectiles():
    """Of a constant: the mean of what is above, with its weight, and of what is below balance."""
    values = np.random.default_rng(4).exponential(size=500)
    residuals = rg.asymmetric_residuals(np.ones((500, 1)), values[:, None])
    above, below = residuals[residuals > 0].sum(), -residuals[residuals < 0].sum()
    assert_allclose(rg.WEIGHT_ABOVE * above, (1 - rg.WEIGHT_ABOVE) * below, rtol=1e-9)


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_quantile_of_chi_squared(n):
    assert rg.chi_squared_quantile(n) == pytest.approx(chi2.ppf(0.99, n), rel=0.02)


def test_all_but_some_starts_are_dropped(monkeypatch):
    """Also where no start moves any more before that: else unlikely ones take part in what follows."""
    sizes, real = [], rg.Surfaces.fit

    def fit(surfaces, sets):
        sizes.append(len(sets))
        return real(surfaces, sets)
    monkeypatch.setattr(rg.Surfaces, 'fit', fit)
    places = np.random.default_rng(1).uniform(-1, 1, (12, 2))
    surfaces = rg.Surfaces(rg.legendre_terms(places, 1), np.zeros((12, 1)), np.ones(12))
    same = np.zeros((40, 12))
    same[:, :6] = 1
    rg.concentrate(surfaces, same, np.full(12, 5.0))
    assert sizes[0] == 40
    assert sizes[-1] == 10


def test_surfaces_are_least_squares():
    """Each of the sets as if alone, weights and all."""
    rng = np.random.default_rng(16)
    places, levels, weights = rng.uniform(-1, 1, (50, 2)), rng.normal(0, 9, (50, 2)), rng.uniform(0.5, 2, 50)
    terms = np.polynomial.legendre.legvander2d(*places.T, [2, 2]).reshape(50, 3, 3)
    terms = np.stack([terms[:, i, j] for i in range(3) for j in range(3 - i)], axis=1)
    assert_allclose(rg.legendre_terms(places, 2), terms, rtol=1e-12)
    sets = (rng.random((4, 50)) < 0.6).astype(float)
    residuals, covariance, distances = rg.Surfaces(terms, levels, weights).fit(sets)
    for i, kept in enumerate(sets > 0):
        root = np.sqrt(weights[kept])[:, None]
        expected = levels - terms @ np.linalg.lstsq(root * terms[kept], root * levels[kept], rcond=None)[0]
        # The ridge that keeps sets without all of the terms solvable.
        assert_allclose(residuals[i], expected, rtol=0, atol=1e-6)
        scatter = expected[kept].T @ expected[kept] / (kept.sum() - 6) + 0.25 * np.eye(2)
        assert_allclose(covariance[i], scatter, rtol=1e-6)
        assert_allclose(distances[i], np.einsum('ij,jk,ik->i', expected, np.linalg.inv(scatter), expected), rtol=1e-5)


def test_rounding_hides_in_noise_or_is_noise():
    sky = np.random.default_rng(17).normal(100, 1, (300, 400, 1))
    points = rg.make_points(rg.find_quiet_places(rg.as_picture(sky), 10, 4.0))
    for scatter, hidden in ((0.2, False), (3.0, True)):
        sky = np.rint(np.random.default_rng(18).normal(100.4, scatter, (300, 400, 1)))
        noise = np.array([scatter / (2 * np.sqrt(np.pi) * 4)])
        for scale in (1, 257, 1 / 255):
            expected = noise * scale if hidden else np.array([scale / np.sqrt(12)])
            found = rg.with_rounding(noise * scale, rg.as_picture(sky * scale), points, 4.0)
            assert_allclose(found, expected, rtol=1e-6)


# ---- points that are given ------------------------------------------------------------------------------------------

def nebula_all_over(seed=3):
    """Return a sky whose nebula covers more than 60 % of the frame, its background, and where there is no nebula."""
    rng = np.random.default_rng(seed)
    background = 1500 + 1.5 * X + 2500 * np.exp(-((X + 150) ** 2 + (Y - 700) ** 2) / (2 * 400.0**2))
    waves = sum(np.cos(X / rng.uniform(60, 200) + Y / rng.uniform(60, 200) + rng.uniform(0, 6)) for _ in range(6))
    light = 700 * np.clip(waves - np.quantile(waves, 0.33), 0, None) / waves.std()
    sky = background + light + rng.normal(0, 40, X.shape)
    return np.rint(sky).astype(np.uint16)[..., None], background[..., None], light


def test_a_few_certain_points_rescue_a_frame_full_of_nebula():
    sky, background, light = nebula_all_over(1)
    assert (light > 20).mean() > 0.6
    blurred = gaussian_filter(light, 8)
    given = []
    for x in (30, 400, 700):  # the clearest place of six parts of the frame: what a person would click on
        for y in (30, 320):
            part = blurred[y:y + 250, x:x + 170]
            row, column = np.unravel_index(part.argmin(), part.shape)
            if part.min() < 5:
                given.append((x + int(column), y + int(row)))
    assert len(given) >= 5
    given = given[:5]
    alone = rg.choose_points(sky)
    helped = rg.choose_points(sky, given=rg.make_points(given))
    assert not alone.chosen.agree
    assert helped.points.x[:5].tolist() == [x for x, _ in given]  # all kept, and first
    assert helped.points.y[:5].tolist() == [y for _, y in given]
    assert len(helped.points.x) > 15  # others that agree with them
    assert helped.chosen.agree
    assert error_of(helped.points, sky, background) < 0.4 * error_of(alone.points, sky, background)


def test_given_isolines_stay_isolines():
    sky, _, _ = sky_with()
    given = rg.make_points([(300, 300), (-600, 300), (100, 100), (-0.0, 5), (800, 500)])
    points = rg.choose_points(sky, given=given).points
    assert points.leader[:5].tolist() == [0, 0, 2, 2, 4]
    assert points.on_isoline[:5].tolist() == given.on_isoline.tolist()
    assert not points.on_isoline[5:].any()
    # No place is chosen that is as good as the same.
    others = np.stack([points.x[5:], points.y[5:]], axis=1)
    assert min(np.hypot(*(others - place).T).min() for place in given.centers) > 16


def test_points_that_grew_need_not_agree():
    """Where the certain points are on nebula themselves: then they change nothing, and are only added."""
    sky, _, light = nebula_all_over(11)
    places = [(x, y) for y in range(40, HEIGHT - 40, 60) for x in range(40, WIDTH - 40, 60)]
    places.sort(key=lambda place: light[place[1], place[0]])
    chosen = rg.choose_points(sky, given=rg.make_points([*places[-4:], *places[60:64]]))
    assert not chosen.chosen.agree
    assert chosen.points.least_shape == 3 * WIDTH


@pytest.mark.parametrize('width', [75, 90, 110, 150])
def test_more_certain_points_than_quiet_places(width):
    sky = np.random.default_rng(6).normal(1000, 10, (75, width, 1))
    given = [(26, 26), (36, 26), (46, 26), (26, 46), (36, 46), (46, 46), (30, 36)]
    points = rg.choose_points(sky, 5, given=rg.make_points(given)).points
    assert points.centers[:7].tolist() == [list(place) for place in given]


def test_certain_points_do_not_harm():
    """Seven true points on a steep glow: the others are as without them."""
    for seed in range(6):
        sky, background = lamp(seed)
        corner = np.argwhere(background[..., 0] == background.max())[0] > 300
        x, y = (np.array([25, 60, 25, 110, 25, 110, 200]), np.array([25, 25, 60, 25, 110, 110, 25]))
        given = np.stack([WIDTH - 1 - x if corner[1] else x, HEIGHT - 1 - y if corner[0] else y], axis=1)
        alone = rg.choose_points(sky)
        helped = rg.choose_points(sky, given=rg.make_points(given))
        errors = [error_of(each.points, sky, background) for each in (alone, helped)]
        assert errors[1] < max(1.1 * errors[0], 5)  # half of the noise of a pixel


def test_points_given_beside_chosen_ones(big):
    assert big('--overwrite', points=['-a', '-p', '30', '300', '400', '300']) == 0
    assert re.search(r'sky.tif: \d+ points chosen from \d+ quiet places in addition to 2 given', big.stderr)


def test_stiff_points_are_saved_with_their_shape(cli):
    """So that -f with the saved points gives the same picture as -a."""
    sky, background, _ = nebula_all_over()
    tifffile.imwrite('sky.tif', sky[..., 0])
    assert cli('--save-points', 'points', points=['-a']) == 0
    assert 'shape at least 2700' in (cli.folder / 'points').read_text().splitlines()[0]
    assert cli('-o', 'again.tif', points=['-f', 'points']) == 0
    assert (cli.folder / 'again.tif').read_bytes() == (cli.folder / 'out.tif').read_bytes()
    chosen = rg.choose_points(sky)
    fit = rg.fit_background(chosen)
    assert fit.adaptive.epsilon >= 2700
    # The gradient of 4000 counts is found to some hundred, in a nebula of 700.
    assert (fit.model.evaluate(0, HEIGHT, WIDTH) - background).std() < 200
    assert_array_equal(rg.remove_gradient(sky, 'auto'), rg.remove_gradient(sky, chosen.points))


def test_agreement():
    assert rg.choose_points(sky_with(nebula=1500.0)[0]).chosen.agree
    assert not rg.choose_points(nebula_all_over()[0]).chosen.agree


# ---- from the command line ------------------------------------------------------------------------------------------

@pytest.fixture
def big(cli):
    sky, background, _ = sky_with()
    tifffile.imwrite('sky.tif', sky, photometric='rgb', compression='zlib', rowsperstrip=64)
    cli.sky = sky
    return cli


def test_auto_and_saved_points(big):
    assert big('--save-points', 'points', points=['-a']) == 0
    assert re.search(r'^rmgradient: sky.tif: \d+ points chosen from \d+ quiet places$', big.stderr, re.MULTILINE)
    lines = (big.folder / 'points').read_text().splitlines()
    assert lines[0] == '# sky.tif, 900 x 600 pixels, sigma 8, chosen automatically'
    expected = rg.choose_points(big.sky).points
    assert lines[1:] == rg.format_points_file(expected)
    assert big('-o', 'again.tif', points=['-f', 'points']) == 0
    assert (big.folder / 'again.tif').read_bytes() == (big.folder / 'out.tif').read_bytes()
    assert big('-o', 'five.tif', '-s', 4, points=['-a', '5']) == 0


def test_auto_beside_given_points(big):
    given = ['-p', '300', '300', '-600', '300', '100', '100', '800', '500']
    assert big('--save-points', 'points', points=['-a', *given]) == 0
    lines = (big.folder / 'points').read_text().splitlines()
    assert lines[1:5] == ['300 300', '-600 300', '100 100', '800 500']
    assert len(lines) > 40
    (big.folder / 'given').write_text('\n'.join(lines[1:5]))
    assert big('-o', 'again.tif', points=['-f', 'given', '-a']) == 0
    assert (big.folder / 'again.tif').read_bytes() == (big.folder / 'out.tif').read_bytes()


def test_warning_where_nothing_agrees(cli):
    tifffile.imwrite('sky.tif', nebula_all_over()[0])
    assert cli('-q', points=['-a']) == 0
    assert 'warning: sky.tif: no smooth background fits' in cli.stderr
    assert '--edit' in cli.stderr


def test_saved_isolines_are_read_again(cli):
    points = ['-p', *'30 30 -0 -5 -119 7 60 40 90 60 40 60'.split()]
    assert cli('--save-points', 'points', points=points) == 0
    assert cli('-o', 'again.tif', points=['-f', 'points']) == 0
    assert (cli.folder / 'again.tif').read_bytes() == (cli.folder / 'out.tif').read_bytes()


def test_points_alone_need_no_output(big):
    assert rg.main(['-q', '-i', 'sky.tif', '-a', '--save-points', 'points']) == 0
    assert big.files() == ['points', 'sky.tif']
    with pytest.raises(SystemExit) as stop:
        rg.main(['-i', 'sky.tif', '-a'])
    assert stop.value.code == 2
    assert 'nothing to write: give -o/--output' in big.capsys.readouterr().err


def test_filled_windows_and_pixels_that_are_no_numbers_are_avoided():
    rng = np.random.default_rng(5)
    sky = rng.normal(1000, 10, (300, 400, 1))
    sky[90:210, 130:290] = 1000  # filled in by a program: the quietest windows of all
    places = rg.find_quiet_places(rg.as_picture(sky), 15, 4.0)
    assert len(places) > 80
    assert not ((places > [142, 102]) & (places < [278, 198])).all(axis=1).any()
    sky = rng.normal(1000, 10, (300, 400, 1)).astype(np.float32)
    sky[rng.random(sky.shape) < 0.0005] = np.nan
    places = rg.find_quiet_places(rg.as_picture(sky), 15, 4.0)
    assert len(places) > 40
    rg.measure_levels(sky, rg.make_points(places), 4.0)  # none is refused


def test_damaged_numbers_are_no_traceback():
    """Bytes that are off by one make floats of any size, in channels that depend on each other."""
    y, x = np.mgrid[:80, :100]
    sky = np.stack([np.random.default_rng(i).normal(0, 10, x.shape) + 1000 + 10 * x for i in range(3)], axis=2)
    shifted = np.frombuffer(sky.astype('>f4').tobytes()[1:] + b'\0', '>f4').reshape(sky.shape).astype(np.float32)
    with contextlib.suppress(rg.RmgradientError):
        rg.choose_points(shifted, 5, 1.0)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('constant', [5.0, 1000.3])
def test_constant_channel_tells_nothing(constant):
    """The points are those of the other channels; a picture of nothing else has points, too, given ones beside."""
    sky = sky_with(glow=4000.0)[0].astype(float)
    expected = rg.choose_points(sky[..., [0, 2]])
    sky[..., 1] = constant
    measured = rg.choose_points(sky)
    assert_array_equal(measured.points.pairs, expected.points.pairs)
    assert measured.chosen.agree == expected.chosen.agree
    flat = np.full((300, 400, 3), constant)
    given = rg.make_points([(60, 60), (-60, 280), (350, 60), (-350, 250)])
    assert len(rg.choose_points(flat).points.x) > 100
    assert len(rg.choose_points(flat, given=given).points.x) > 100


def test_narrow_picture_of_a_few_places():
    """Fifteen places on a line: enough for a parabola."""
    for seed in range(4):
        noise = np.random.default_rng(seed).normal(0, 20, (4000, 100))
        picture = noise + (1000 + 200 * (np.arange(4000) / 4000) ** 2)[:, None]
        assert len(rg.choose_points(picture).points.x) >= 12


def test_points_on_one_isoline_are_one_measurement():
    """Five measured points lead the growth of others; one with five more on its isoline does not."""
    sky, _, _ = nebula_all_over()
    given = rg.make_points([(40, 500), (-60, 500), (-80, 500), (-100, 500), (-120, 500), (-140, 500)])
    measured = rg.choose_points(sky, given=given)
    assert not measured.chosen.agree
    assert measured.points.least_shape > 0  # where sky grows, small shapes are allowed


def test_grids_that_are_too_fine():
    for n in (2, 31):
        with pytest.raises(rg.RmgradientError, match=f'a grid of {n} cells along the longer side is not from 3 to 30'):
            rg.choose_points(sky_with()[0], n)


def test_auto_options_and_errors(cli):
    cli.fails('-b', 'bg.tif', match='sky.tif: ', points=['-a'])
    for value in ('2', '31', 'x'):
        cli.fails(status=2, match='is not a whole number from 3 to 30', points=['-a', value])
    cli.fails('--save-points', 'out.tif', match='is named for two outputs')
    (cli.folder / 'points').write_text('30 30\n40 40\n50 50\n')
    cli.fails('--save-points', 'points', match='points: already exists', points=['-f', 'points'])
    assert cli('--save-points', 'points', '--overwrite', points=['-f', 'points']) == 0  # edited in place


def test_preview_shows_three_panels(big):
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    sky = np.clip(big.sky + 40000 * np.exp(-((x - 450) ** 2 + (y - 300) ** 2) / 50)[..., None], 0, 65535)
    sky[-20:, :40] = 5  # becomes black
    tifffile.imwrite('sky.tif', sky.astype(np.uint16), photometric='rgb')
    good = [(px, py) for px in range(40, 880, 90) for py in range(60, 580, 80)
            if sky[py - 24:py + 25, px - 24:px + 25].max() < 9000]
    points = ['-p', *(str(v) for p in good for v in p), '453', '303']
    assert big('--preview', 'preview.png', points=points) == 0
    assert 'point (453, 303)' in big.stderr
    pixels = np.rint(imread(big.folder / 'preview.png') * 255).astype(np.uint8)[..., :3].astype(int)
    height, width, _ = pixels.shape
    assert 2.2 < width / height < 5
    orange = np.abs(pixels - [255, 165, 0]).sum(axis=2) < 30
    red = (pixels[..., 0] > 240) & (pixels[..., 1:].max(axis=2) < 40)
    blue = np.abs(pixels - [0, 51, 255]).sum(axis=2) < 30
    for mask, part in ((orange, 0), (red, 0), (blue, 2)):  # points and misfits on the picture; black in the result
        columns = np.flatnonzero(mask.any(axis=0))
        assert len(columns)
        assert width * part / 3 < columns.min()
        assert columns.max() < width * (part + 1.05) / 3
    # Before: the lower left is brighter than the upper right. After: about the same.
    panels = [pixels[:, int(width * a):int(width * (a + 0.27))].astype(float) for a in (0.05, 0.71)]
    differences = [np.median(panel[int(height * 0.7):int(height * 0.8), :80]) -
                   np.median(panel[int(height * 0.25):int(height * 0.35), -80:]) for panel in panels]
    assert differences[0] > 30
    assert abs(differences[1]) < 12


def test_numbers_of_points_can_be_read():
    """No number covers another or its border, most points have one, and each misfit does."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:400, :600].astype(float)
    frame = 1000 + 0.4 * x + rng.normal(0, 10, x.shape)
    frame[170:235, 270:335] += 100
    places = [(px, py) for px in range(30, 571, 30) for py in range(30, 371, 30)
              if np.hypot(px - 302, py - 202) > 60] + [(302, 202)]
    correction = rg.find_correction(frame, places)
    figure = rg.preview_figure(correction.picture, correction)
    figure.canvas.draw()
    axes = figure.axes[0]
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert {str(i + 1) for i, _ in correction.misfits} <= set(boxes)
    assert correction.misfits
    assert len(boxes) > 0.8 * len(places)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2))
    for i, (place, number) in enumerate((places[int(text) - 1], boxes[text]) for text in boxes):
        assert np.hypot(*(axes.transData.transform(place) - [number.x0, number.y0])) < 60, i


def test_areas_that_are_not_measured_are_green():
    """Transparent land, and a masked nebula."""
    rng = np.random.default_rng(3)
    frame = np.ones((200, 300, 4), np.float32)
    frame[..., :3] = rng.normal(1000, 10, (200, 300, 1))  # gray: what is green is the tint
    frame[150:, :, 3] = 0
    tifffile.imwrite('alpha.tif', frame, photometric='rgb', extrasamples=['unassalpha'])
    mask = np.zeros((200, 300), bool)
    mask[40:60, 100:140] = True
    places = [(x, y) for x in range(30, 280, 40) for y in (30, 100, 120)]
    with rg.open_picture('alpha.tif') as picture:
        picture.mask = rg.as_picture(mask.astype(np.uint8))
        figure = rg.preview_figure(picture, rg.find_correction(picture, places))
    red, green, _ = figure.axes[0].images[0].get_array().transpose(2, 0, 1)
    expected = mask.copy()
    expected[150:] = True
    assert (green - red > 0.2)[expected].mean() > 0.95
    assert (green - red > 0.2)[~expected].mean() < 0.05
    assert 'green: not measured' in figure.axes[0].get_title()


def test_preview_needs_no_output(big):
    assert rg.main(['-q', '-i', 'sky.tif', '-a', '--preview', 'p.png', '--save-points', 'points']) == 0
    assert big.files() == ['p.png', 'points', 'sky.tif']
    assert rg.main(['-q', '-i', 'sky.tif', '-f', 'points', '-b', 'bg.tif']) == 0
    assert big.files() == ['bg.tif', 'p.png', 'points', 'sky.tif']


@pytest.mark.parametrize(('name', 'begin'), [('p.pdf', b'%PDF'), ('p.SVG', b'<?xml'), ('p.png', b'\x89PNG')])
def test_preview_kinds(cli, name, begin):
    for sky in (cli.sky, cli.sky[..., 0], np.full((90, 120), 7, np.uint8))[:3 if name == 'p.png' else 1:2]:
        tifffile.imwrite('sky.tif', sky, photometric='rgb' if sky.ndim == 3 else 'minisblack')
        assert cli('--preview', name, '--overwrite') == 0
        assert (cli.folder / name).read_bytes().startswith(begin)


def test_preview_without_memory(cli, monkeypatch):
    def savefig(*_, **__):
        raise ValueError('Input array could not be made C-contiguous')
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', savefig)
    cli.fails('--preview', 'p.png', match='sky.tif: not enough memory')


def test_preview_errors(cli, monkeypatch):
    cli.fails('--preview', 'preview.jpg', status=2, match="'preview.jpg' does not end in .png, .pdf or .svg")
    (cli.folder / 'preview.png').write_text('old')
    cli.fails('--preview', 'preview.png', match='preview.png: already exists')
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    hint = rg.how_to_install('matplotlib')
    cli.fails('--preview', 'other.png', match=f'other.png: matplotlib is missing; run: {hint}')


@pytest.mark.parametrize('size', [(90, 120), (1100, 301), (301, 1100), (3, 2001)])
def test_binned_picture_is_the_mean_of_a_few_rows(size):
    picture = np.random.default_rng(14).integers(0, 9, (*size, 2))
    binned, k, *_ = rg.read_binned(rg.as_picture(picture), n=250)
    n_rows = min(k, 4 if k < 8 else 1)
    expected = [[picture[y:y + n_rows, x:x + k].mean(axis=(0, 1)) for x in range(0, size[1], k)]
                for y in range(0, size[0], k)]
    assert max(np.shape(expected)[:2]) <= 251
    assert_allclose(binned, expected, rtol=1e-12)
    part, k, *_ = rg.read_binned(rg.as_picture(picture), (1, 3, 0, 2))
    assert k == 1
    assert_array_equal(part, picture[0:2, 1:3])


@pytest.mark.parametrize('method', ['subtract', 'stretch', 'divide'])
@pytest.mark.parametrize('dtype', ['u1', 'u2', 'f4'])
def test_binned_result_is_that_of_the_pixels(method, dtype):
    sky, background = draw(dtype=np.dtype(dtype))
    if dtype == 'f4':
        sky = sky.clip(0, 1)
    level = np.median(background, axis=(0, 1))
    found = correction(sky, background, level, method=method)
    after, black, _ = rg.correct_binned(found, rg.read_binned(rg.as_picture(sky)), background)
    expected = found.apply(sky)
    assert np.abs(after.clip(0, 255 if dtype == 'u1' else 65535) - expected).max() < (1e-6 if dtype == 'f4' else 0.51)
    assert not black.any()
    sky[:5, -5:] = 0  # no data
    sky[20, 50:60] = sky.max() // 99 if dtype != 'f4' else 1e-4
    after, black, _ = rg.correct_binned(found, rg.read_binned(rg.as_picture(sky)), background + 2 * level)
    assert (after[:5, -5:] == 0).all()
    assert black[20, 50:60].all() == (method != 'divide')
    assert not black[:5, -5:].any()


def test_preview_of_the_classic_way_is_what_is_written(cli, monkeypatch):
    """Stretched with 0 for the sky; the adaptive way is told from it."""
    drawn, real = [], rg.correct_binned

    def correct_binned(*arguments):
        drawn.append(real(*arguments)[0])
        return real(*arguments)
    monkeypatch.setattr(rg, 'correct_binned', correct_binned)
    for smooth in ('0.1', 'auto'):
        assert cli('--preview', 'p.png', '--stretch', '-m', smooth, '--overwrite') == 0
        written = tifffile.imread('out.tif')
        assert np.abs(drawn[-1].clip(0, 65535) - written).max() < 0.51  # rounding


@pytest.mark.parametrize('factor', [1, 3, 8])
def test_shrunk_model(factor):
    points = rg.make_points(np.random.default_rng(4).integers(0, 240, (20, 2)))
    levels = np.stack([100 + points.x + np.hypot(points.x - 99, points.y), 7.0 * points.y], axis=1)
    model = fit(points, levels).model
    full = model.evaluate(0, 240, 240)
    middle = np.arange(factor // 2, 240, factor)  # of the large pixels, where their number of small ones is odd
    small = model.shrunk(factor).evaluate(0, 240 // factor, 240 // factor)
    if factor == 8:
        full = (full[:-1, :-1] + full[1:, 1:] + full[1:, :-1] + full[:-1, 1:]) / 4
        middle = middle - 1
    assert_allclose(small, full[np.ix_(middle, middle)], rtol=0, atol=1e-6 if factor != 8 else 0.5)


def test_midtones_take_the_median_to_a_quarter():
    picture = np.random.default_rng(15).normal(1000, 30, (100, 100, 3))
    picture[0, :10] = 60000
    stretched = rg.stretch_midtones(picture)
    assert_allclose(np.median(stretched, axis=(0, 1)), 0.25, atol=0.01)
    assert_array_equal(rg.stretch_midtones(picture[:5], picture), stretched[:5])
    assert not rg.stretch_midtones(np.full((4, 4, 1), np.nan)).any()
    assert stretched.max() == 1
    order = np.argsort(picture[..., 0], axis=None)
    assert (np.diff(stretched[..., 0].ravel()[order]) >= 0).all()


def test_progress_bar_is_for_terminals(cli, monkeypatch):
    class Terminal:
        text = ''

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    import tqdm
    show = rg.progress_bar
    monkeypatch.setattr(sys, 'stderr', terminal := Terminal())
    rg.logger.setLevel('INFO')
    assert list(show('picture')(iter('abc'), 3)) == ['a', 'b', 'c']
    assert terminal.text == ''  # over within a second
    monkeypatch.setattr(tqdm, 'tqdm', lambda results, **options: (terminal.write(f'{options}'), results)[1])
    list(show('strip', ' 24 megapixels')(iter('abc'), 3, 'correcting'))
    assert "'desc': 'correcting 24 megapixels', 'total': 3" in terminal.text
    rg.logger.setLevel('WARNING')
    terminal.text = ''
    list(show('picture')(iter('abc'), 3))
    assert terminal.text == ''


@pytest.mark.parametrize('turn', [lambda sky: sky[:, ::-1], lambda sky: sky[::-1], lambda sky: sky.transpose(1, 0, 2)])
def test_points_do_not_know_left_from_right(turn):
    """The same points, mirrored, for a mirrored picture whose sides are multiples of a tile."""
    for sky in (sky_with(nebula=1500.0)[0], nebula_all_over()[0]):
        sky = sky[:576, :864]
        index = turn(np.arange(sky.shape[0] * sky.shape[1]).reshape(*sky.shape[:2], 1))[..., 0]
        chosen, again = rg.choose_points(sky).points, rg.choose_points(np.ascontiguousarray(turn(sky))).points
        back = index[again.y, again.x]
        assert set(zip(chosen.x.tolist(), chosen.y.tolist())) == set(zip((back % 864).tolist(), (back // 864).tolist()))
