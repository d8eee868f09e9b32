# SPDX-License-Identifier: Apache-2.0
import itertools

import make_sky
import numpy as np
import pytest
import threadpoolctl
from helpers import fit, measured, scatter
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.interpolate import Rbf

import rmgradient as rg

HEIGHT, WIDTH = 200, 300


def problem(n=15, n_channels=3, seed=5, height=HEIGHT, width=WIDTH):
    """Return points and smooth levels with noise."""
    rng = np.random.default_rng(seed)
    points = rg.make_points(scatter(height, width, n, margin=3, seed=seed))
    u, v = points.x / width, points.y / height
    levels = np.stack([1000 * np.exp(-u - v * k / 3) + 300 * u * v for k in range(n_channels)], axis=1)
    return points, levels + rng.normal(0, 2, levels.shape)


def dense_classic(points, levels, smooth, height=HEIGHT, width=WIDTH):
    """Return the classic model, every equation written out."""
    n = len(points.x)
    box = (points.x.max() - points.x.min()) * (points.y.max() - points.y.min())
    epsilon = np.sqrt(box / n)

    def kernel(x, y):
        return np.sqrt(((x[:, None] - points.x) ** 2 + (y[:, None] - points.y) ** 2) / epsilon**2 + 1)

    weights = np.linalg.solve(kernel(points.x, points.y) - smooth * np.eye(n), levels)
    y, x = np.mgrid[0:height, 0:width]
    return (kernel(x.ravel(), y.ravel()) @ weights).reshape(height, width, -1)


@pytest.mark.parametrize('smooth', [0, 0.1, 3.0])
@pytest.mark.parametrize('n_channels', [1, 3])
def test_classic_model_is_the_dense_solution(smooth, n_channels):
    points, levels = problem(n_channels=n_channels)
    model = fit(points, levels, smooth).model
    # A condition number below 1e5 times rounding errors of 1e-16, times levels of 1000: 1e-8.
    assert_allclose(model.evaluate(0, HEIGHT, WIDTH), dense_classic(points, levels, smooth), rtol=0, atol=1e-8)
    assert fit(points, levels, smooth).adaptive is None


@pytest.mark.parametrize('places', [scatter(n=12), [(3, 4), (9, 4), (20, 4)], [(3, 4), (3, 40), (3, 5)]])
def test_average_spacing_is_that_of_scipy(places):
    points = rg.make_points(places)
    assert rg.average_spacing(points.centers) == pytest.approx(Rbf(points.x, points.y, points.x, smooth=1).epsilon)


def test_classic_model_goes_through_the_levels_without_smoothing():
    points, levels = problem()
    background = fit(points, levels, 0).model.evaluate(0, HEIGHT, WIDTH)
    assert_allclose(background[points.y, points.x], levels, rtol=1e-9)


def test_decompositions_take_one_thread_each(monkeypatch):
    """Also for who imports us: threads of ours and threads of the BLAS would wait for each other."""
    threads, eigh = [], np.linalg.eigh

    def watch(matrix):
        threads.extend(library['num_threads'] for library in threadpoolctl.threadpool_info()
                       if library['user_api'] == 'blas' and 'numpy' in library['filepath'])
        return eigh(matrix)
    monkeypatch.setattr(np.linalg, 'eigh', watch)
    with threadpoolctl.threadpool_limits(2):
        before = threadpoolctl.threadpool_info()
        fit(*problem())
        assert threadpoolctl.threadpool_info() == before
    assert set(threads) <= {1}


def test_too_many_points_are_refused():
    places = [(i % 100, i // 100) for i in range(rg.MOST_POINTS + 1)]
    with pytest.raises(rg.RmgradientError, match='5001 points are too many.*; give at most 5000'):
        rg.make_points(places)
    assert len(rg.make_points(places[1:]).x) == rg.MOST_POINTS


def test_singular_smoothness_is_an_error():
    points, levels = problem(n=3)
    epsilon = Rbf(points.x, points.y, levels[:, 0]).epsilon
    distances = np.hypot(points.x[:, None] - points.x, points.y[:, None] - points.y)
    largest = np.linalg.eigvalsh(np.sqrt((distances / epsilon) ** 2 + 1))[-1]
    with pytest.raises(rg.RmgradientError, match='singular'):
        fit(points, levels, largest)


@pytest.mark.parametrize('smooth', ['auto', 0.1])
def test_model_does_not_mind_shifts_turns_and_order(smooth):
    points, levels = problem()
    background = fit(points, levels, smooth).model.evaluate(0, HEIGHT, WIDTH)
    tolerance = {'rtol': 0, 'atol': 1e-6}  # condition up to 1e8 for the adaptive model x 1e-16 x levels of 1000
    moved = rg.Points(points.x + 70, points.y + 30, points.leader)
    assert_allclose(fit(moved, levels, smooth).model.evaluate(30, HEIGHT + 30, WIDTH + 70)[:, 70:],
                    background, **tolerance)
    turned = rg.Points(points.y, points.x, points.leader)
    assert_allclose(fit(turned, levels, smooth).model.evaluate(0, WIDTH, HEIGHT).transpose(1, 0, 2),
                    background, **tolerance)
    assert_allclose(fit(points, levels[:, ::-1], smooth).model.evaluate(0, HEIGHT, WIDTH)[..., ::-1],
                    background, **tolerance)
    order = np.random.default_rng(6).permutation(len(levels))
    shuffled = rg.Points(points.x[order], points.y[order], np.arange(len(order)))
    assert_allclose(fit(shuffled, levels[order], smooth).model.evaluate(0, HEIGHT, WIDTH), background,
                    **tolerance)
    assert_allclose(fit(points, 3 * levels, smooth).model.evaluate(0, HEIGHT, WIDTH), 3 * background,
                    **tolerance)


# ---- the adaptive model ---------------------------------------------------------------------------------------------

def line(n):
    return rg.make_points([(30 + 12 * i, 40 + 5 * i) for i in range(n)])


@pytest.mark.parametrize('points', [line(3), line(12), *(rg.make_points(scatter(HEIGHT, WIDTH, n, margin=3))
                                                         for n in (3, 4, 5, 300))],
                         ids=['3 on a line', '12 on a line', '3', '4', '5', '300'])
def test_constants_and_planes_are_kept(points):
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    along_line = 12 * x + 5 * y  # a slope across collinear points leaves no trace in their levels
    for plane in (np.full_like(x, 40000.0), 500 + 2 * along_line, -1e-3 * along_line, np.full_like(x, 1e-3)):
        levels = plane[points.y, points.x][:, None] * [1.0, 0.5]
        background = fit(points, levels).model.evaluate(0, HEIGHT, WIDTH)
        # Least squares of a well-conditioned plane: rounding errors, extrapolated some ten times as far as the points.
        assert_allclose(background, plane[..., None] * [1.0, 0.5], rtol=0, atol=1e-12 * np.abs(plane).max())


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
def test_plane_picture_becomes_constant(dtype):
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    scale = {np.uint8: 0.2, np.uint16: 90.0, np.float32: 1e-3}[dtype]
    sky = ((300 + x - 0.5 * y) * scale)[..., None]
    sky = (sky if dtype is np.float32 else np.rint(sky)).astype(dtype)
    points = rg.make_points(scatter(HEIGHT, WIDTH, 30))
    corrected = rg.remove_gradient(sky, points, sky='darkest')
    # The picture was rounded, and the output is: one count. float32 holds 7 digits of values below 1.
    assert np.ptp(corrected.astype(float)) <= (1e-6 if dtype is np.float32 else 1)


def adaptive_system(points, levels, model, without=()):
    """Solve trend and multiquadric together, as written in the notes of choose_model, without some of the points."""
    keep = np.setdiff1d(np.arange(len(points.x)), without)
    centers = np.stack([points.x, points.y], axis=1).astype(float)
    terms = np.hstack([np.ones((len(centers), 1)), centers])[:, :3 if model.trend == 'plane' else 1]

    def kernel(a, b):
        return np.sqrt(((a[:, None] - b) ** 2).sum(axis=2) / model.epsilon**2 + 1)

    p = terms[keep]
    matrix = np.block([[kernel(centers[keep], centers[keep]) - model.smooth * np.eye(len(keep)), p],
                       [p.T, np.zeros((p.shape[1],) * 2)]])
    solution = np.linalg.solve(matrix, np.vstack([levels[keep], np.zeros((p.shape[1], levels.shape[1]))]))
    weights, trend = solution[:len(keep)], solution[len(keep):]
    return lambda at: (kernel(at, centers[keep]) @ weights
                       + np.hstack([np.ones((len(at), 1)), at])[:, :len(trend)] @ trend)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('n', [8, 30])
def test_adaptive_model_solves_trend_and_multiquadric_together(n, seed):
    points, levels = problem(n=n, seed=seed)
    _, model, adaptive, _ = fit(points, levels)
    y, x = np.mgrid[0:HEIGHT:20, 0:WIDTH:20]
    expected = adaptive_system(points, levels, adaptive)(np.stack([x.ravel(), y.ravel()], axis=1).astype(float))
    # Condition up to 1e8 x 1e-16 x 1000.
    assert_allclose(model.evaluate(0, HEIGHT, WIDTH)[::20, ::20].reshape(-1, 3), expected, rtol=0, atol=1e-5)


def test_left_out_errors_are_those_of_fits_without_the_points():
    points, levels = problem(n=20)
    points = points._replace(leader=np.array([0, 0, 0, *range(3, 20)]))
    levels[1:3] = levels[0]
    model = fit(points, levels).adaptive
    for group in [[0, 1, 2], *([i] for i in range(3, 20))]:
        predict = adaptive_system(points, levels, model, without=group)
        predicted = predict(np.stack([points.x, points.y], axis=1)[group].astype(float))
        assert_allclose(model.errors[group], levels[group] - predicted, rtol=1e-6, atol=1e-6)


def test_isolines_of_two_points_are_left_out_together():
    """Each would vouch for the other."""
    points, levels = problem(n=20)
    points = points._replace(leader=np.array([0, 0, *range(2, 20)]))
    levels[1] = levels[0]
    model = fit(points, levels).adaptive
    predict = adaptive_system(points, levels, model, without=[0, 1])
    assert_allclose(model.errors[:2], levels[:2] - predict(points.centers[:2]), rtol=1e-6, atol=1e-6)


def test_all_channels_share_the_choice_and_scale_does_not_matter():
    points, levels = problem(n=25)
    one = fit(points, levels).adaptive
    other = fit(points, levels * [1, 1e-3, 1e3]).adaptive
    assert one[:3] == other[:3]


def test_flat_channel_beside_others_stays_flat():
    points, levels = problem(n=25)
    levels[:, 1] = 777.0
    background = fit(points, levels).model.evaluate(0, HEIGHT, WIDTH)
    assert_allclose(background[..., 1], 777.0, rtol=1e-12)


@pytest.mark.parametrize('n', [10, 60])
def test_candidates_never_make_the_equations_singular(n, monkeypatch):
    points, levels = problem(n=n)
    for shape, smooth in itertools.product(rg.SHAPES, rg.SMOOTHNESS):
        monkeypatch.setattr(rg, 'SHAPES', np.array([shape]))
        monkeypatch.setattr(rg, 'SMOOTHNESS', np.array([rg.SMOOTHNESS[0], smooth]))
        background = fit(points, levels).model.evaluate(0, HEIGHT, WIDTH)
        # All are at least sane: no farther from the levels than their own range beyond them.
        assert levels.min() - np.ptp(levels) < background.min()
        assert background.max() < levels.max() + np.ptp(levels)


@pytest.mark.parametrize('seed', [1, 2])
def test_adaptive_model_is_far_closer_to_the_truth(seed):
    rng = np.random.default_rng(seed)
    points = rg.make_points(scatter(make_sky.HEIGHT, make_sky.WIDTH, 40, seed=seed))
    truth = make_sky.true_background()
    levels = truth[points.y, points.x] + rng.normal(0, 3, (40, 3))
    error = {smooth: (fit(points, levels, smooth).model.evaluate(0, make_sky.HEIGHT, make_sky.WIDTH)
                      - truth).std() for smooth in ('auto', 0.1)}
    assert error['auto'] < 0.2 * error[0.1]
    assert error['auto'] < 15  # of a glow of 4000 counts, at points of noise 3 that leave the corners out


def test_good_points_give_no_warning_and_bad_ones_do():
    rng = np.random.default_rng(7)
    truth = make_sky.true_background()
    sky = truth + rng.normal(0, make_sky.NOISE, truth.shape)
    make_sky.add_nebula(sky, rng)
    center_x, center_y, half_x, half_y = make_sky.NEBULA
    good = [(x, y) for x, y in scatter(make_sky.HEIGHT, make_sky.WIDTH, 60).tolist()
            if ((x - center_x) / (half_x + 24)) ** 2 + ((y - center_y) / (half_y + 24)) ** 2 > 1]

    def misfits(places):
        points = rg.make_points(places)
        found = rg.find_misfits(rg.fit_background(rg.measure_levels(sky, points)))
        return [(places[i], error) for i, error in found]

    assert misfits(good) == []
    (place, error), = misfits([*good, (center_x, center_y)])
    assert place == (center_x, center_y)
    assert 500 < error < 2000  # the nebula has 1300 counts of red
    y, x = np.mgrid[0:make_sky.HEIGHT, 0:make_sky.WIDTH]
    sky += 3000 * np.exp(-((x - 100) ** 2 + (y - 100) ** 2) / 300)[..., None]  # a galaxy; stars are left out
    good = [(x, y) for x, y in good if np.hypot(x - 100, y - 100) > 80]
    (place, error), = misfits([*good, (103, 98)])
    assert place == (103, 98)
    assert error > 0
    sky -= 6000 * np.exp(-((x - 100) ** 2 + (y - 100) ** 2) / 300)[..., None]  # a dark cloud
    (place, error), = misfits([*good, (103, 98)])
    assert error < 0
    both = {place for place, _ in misfits([*good, (103, 98), (center_x, center_y)])}
    assert {(103, 98), (center_x, center_y)} <= both


def test_steep_glows_are_no_misfits():
    """Where a glow is steep, points are hard to predict, and so are their neighbors, which acquit them.

    But two bad neighbors do not acquit each other.
    """
    rng, n_sets, n_found, n_pairs = np.random.default_rng(11), 0, 0, 0
    for _ in range(40):
        places = np.unique(np.stack([rng.integers(25, 875, 40), rng.integers(25, 575, 40)], axis=1), axis=0)
        x, y = places.T
        glow = 1000 + 3000 * np.exp(-((x - rng.uniform(0, 900)) ** 2 + (y - rng.uniform(0, 600)) ** 2) / 2 /
                                    rng.uniform(60, 200) ** 2)
        points, noise = rg.make_points(places), np.full((len(x), 3), 3.0)
        levels = glow[:, None] * [1, 0.9, 0.8] + rng.normal(0, noise)
        n_sets += bool(rg.find_misfits(rg.fit_background(measured(points, levels, noise))))
        levels[20] += 1500
        misfits = rg.find_misfits(rg.fit_background(measured(points, levels, noise)))
        n_found += 20 in [i for i, _ in misfits]
        neighbor = rg.distances_between(points.centers, points.centers)[20].argsort()[1]
        levels[neighbor] += 1300
        misfits = rg.find_misfits(rg.fit_background(measured(points, levels, noise)))
        n_pairs += {20, neighbor} <= {i for i, _ in misfits}
    assert n_sets <= 12  # 23 if none acquit pairs or single points
    assert n_found >= 33
    assert n_pairs >= 33  # 5 if pairs are not judged


# ---- evaluation -----------------------------------------------------------------------------------------------------

def assert_evaluates(model, levels, height, width, rows):
    """Compare some rows of groups, each evaluated by panels, with the sum of multiquadrics at single pixels."""
    rng = np.random.default_rng(8)
    starts = rng.choice(range(0, height, rows), min(3, -(-height // rows)), replace=False)
    scale = np.ptp(levels, axis=0) + np.abs(model.plane[1:]).sum() + np.finfo(float).tiny
    for start in starts.tolist():
        stop = min(start + rows, height)
        seen = np.zeros((stop - start, width), int)
        for some_rows, columns, _ in model.blocks(start, stop, width):
            seen[some_rows, columns] += 1
        assert (seen == 1).all()
        background = model.evaluate(start, stop, width)
        some_y, some_x = rng.integers(start, stop, 40), rng.integers(0, width, 40)
        some_x[:2] = 0, width - 1
        some_y[:2] = start, stop - 1
        distances = np.hypot(some_x[:, None] - model.centers[:, 0], some_y[:, None] - model.centers[:, 1])
        direct = np.sqrt((distances / model.epsilon) ** 2 + 1) @ model.weights
        direct += np.stack([np.ones(40), some_x, some_y], axis=1) @ model.plane
        assert (np.abs(background[some_y - start, some_x] - direct) <= 1e-9 * scale).all()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_evaluation_is_direct_evaluation(data):
    height = data.draw(st.sampled_from([1, 2, 50, 101, 400, 3000]), 'height')
    width = data.draw(st.sampled_from([1, 2, 33, 250, 1000, 6000, 50000]), 'width')
    n = data.draw(st.sampled_from([3, 4, 12, 40, 300, 1000]), 'n')
    rows = data.draw(st.sampled_from([1, 3, 100, 256]), 'rows')
    if n >= 300:
        width, rows = min(width, 1000), min(rows, 100)
    crowd = data.draw(st.sampled_from([1.0, 0.3, 0.02]), 'crowd')  # part of the frame that holds all points
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), 'seed'))
    places = np.unique(np.c_[rng.integers(0, max(2, int(crowd * width)), n),
                             rng.integers(0, max(3, int(crowd * height)), n)], axis=0)
    if len(places) < 3:
        places = np.array([[0, 0], [0, 1], [0, 2]])
    points = rg.make_points(places)
    levels = rng.normal(1000, 30, (len(places), data.draw(st.sampled_from([1, 3]), 'n_channels')))
    smooth = data.draw(st.sampled_from(['auto', 0.1]), 'smooth') if n < 300 else 0.1
    assert_evaluates(fit(points, levels, smooth).model, levels, height, width, rows)


@pytest.mark.parametrize('rows', [1, 7, 99, 100, 1000])
def test_groups_of_rows_change_nothing_but_rounding(rows):
    points, levels = problem()
    model = fit(points, levels).model
    groups = np.concatenate([model.evaluate(*group, WIDTH) for group in rg.row_groups(HEIGHT, rows)])
    assert_allclose(groups, model.evaluate(0, HEIGHT, WIDTH), rtol=0, atol=1e-9 * np.ptp(levels))


def test_darkest_is_the_lowest_background():
    points, levels = problem()
    model = fit(points, levels).model
    background = model.evaluate(0, HEIGHT, WIDTH)
    above = model.above(background.min(axis=(0, 1))).evaluate(0, HEIGHT, WIDTH)
    assert_allclose(above.min(axis=(0, 1)), 0, rtol=0, atol=1e-9)
    assert_allclose(above, background - background.min(axis=(0, 1)), rtol=0, atol=1e-9)
    for rows in (1, 64, 1000):
        darkest = rg.find_darkest(model, rg.as_picture(background), rows)
        assert_allclose(darkest, background.min(axis=(0, 1)), rtol=1e-12)


@pytest.mark.parametrize('rows', [50, 100])
def test_darkest_of_each_channel_is_found_wherever_it_is(rows):
    """Channels that are darkest in different groups of rows."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    for seed in range(5):
        points = rg.make_points(scatter(HEIGHT, WIDTH, 40, margin=3, seed=seed))
        levels = 1000 + np.stack([points.y, -points.y, np.hypot(points.x - 150, points.y - 100)], axis=1)
        model = fit(points, levels, 0.1).model
        lowest = rg.find_darkest(model, rg.as_picture(np.zeros((HEIGHT, WIDTH))), rows)
        distances = np.sqrt(((x[..., None] - points.x) ** 2 + (y[..., None] - points.y) ** 2) / model.epsilon**2 + 1)
        assert_allclose(lowest, (distances @ model.weights).min(axis=(0, 1)), rtol=1e-9)


@pytest.mark.parametrize('epsilon', [0.5, 3.0, 30.0, 500.0, 1e5])
@pytest.mark.parametrize('n_pixels', [1, 2, 61, 1000])
def test_panels_interpolate_a_multiquadric_to_rounding(n_pixels, epsilon):
    nodes, matrix = rg.chebyshev_panels(n_pixels, epsilon)
    x = np.arange(nodes.shape[0] * matrix.shape[0])
    for center in (-7.3, 0.0, n_pixels / 2, n_pixels + 100.0):
        values = (np.sqrt(((nodes - center) / epsilon) ** 2 + 1) @ matrix.T).ravel()
        expected = np.sqrt(((x - center) / epsilon) ** 2 + 1)
        assert_allclose(values, expected, rtol=0, atol=1e-14 * expected.max())
    assert nodes.size <= 44 * np.ceil(n_pixels / (2 * epsilon + 1))  # few where few will do
