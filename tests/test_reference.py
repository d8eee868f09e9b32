# SPDX-License-Identifier: Apache-2.0
"""A picture beside a reference of the same field."""
import functools

import numpy as np
import pytest
import tifffile
from helpers import measured, words
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import gaussian_filter, rotate, shift

import rmgradient as rg

HEIGHT, WIDTH = 400, 600
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
U, V = X / WIDTH, Y / HEIGHT


@functools.lru_cache
def field(seed=1):
    """Return the (HEIGHT, WIDTH, 3) light of a nebula that fills the frame, and of stars."""
    rng = np.random.default_rng(seed)
    clouds = sum(4**i * gaussian_filter(rng.normal(size=(HEIGHT, WIDTH)), 2.0**i * 6, mode='wrap') for i in range(4))
    light = 900 * np.exp(0.6 * clouds / clouds.std())
    stars = np.zeros((HEIGHT, WIDTH))
    stars[rng.integers(0, HEIGHT, 500), rng.integers(0, WIDTH, 500)] = 3000 * rng.pareto(1.2, 500).clip(0, 50)
    return light[..., None] * [1.0, 0.5, 0.6] + gaussian_filter(stars, 1.3)[..., None] * [1.0, 0.9, 0.8]


def glow(rng, strength=4000):
    """Return a dome beyond a border of the frame, (HEIGHT, WIDTH, 3)."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = 0.5 + 0.8 * np.cos(angle), 0.5 + 0.8 * np.sin(angle)
    dome = np.exp(-((U - x) ** 2 + (V - y) ** 2) / (2 * rng.uniform(0.3, 0.6) ** 2))
    return 1500 + strength * rng.uniform(0.5, 1) * dome[..., None] * [1.0, 0.8, 0.6]


def pair(*arguments):
    """Return copies of what `draw_pair` draws once."""
    return [each.copy() for each in draw_pair(*arguments)]


@functools.lru_cache
def draw_pair(seed=2, scale=(0.8, 0.9, 1.1)):
    """Return a frame, its reference, and the frame's background, as it is found: without the reference's constant."""
    rng = np.random.default_rng(seed)
    background = glow(rng)
    frame = background + field() * scale + rng.normal(0, 50, background.shape)
    reference = 800 + field() + rng.normal(0, 10, background.shape)
    return np.rint(frame).astype(np.uint16), np.rint(reference).astype(np.uint16), background


def error_of(model, background):
    """Return the largest RMS error of a channel, its mean removed, in counts of a noise of 50."""
    return (model.evaluate(0, HEIGHT, WIDTH) - background)[2::4, 2::4].std(axis=(0, 1)).max()


def beside(frame, reference, **more):
    return rg.find_correction(frame, 'auto', reference=reference, **more)


def places_beside(frame, reference, n=15, given=None):
    return rg.places_beside_reference([rg.as_picture(each) for each in (frame, reference)], n, 8.0, given)


def test_reference_tells_nebula_from_glow():
    frame, reference, background = pair()
    found = beside(frame, reference)
    assert error_of(found.model, background) < 3
    assert error_of(rg.find_correction(frame, 'auto').model, background) > 100
    # What is left is the field, on a level sky.
    left = gaussian_filter(found.apply(frame) - field() * [0.8, 0.9, 1.1], (8, 8, 0))
    assert (left.std(axis=(0, 1)) < 6).all()


def test_scale_and_its_standard_error():
    off = []
    for seed in range(3, 9):
        frame, reference, _ = pair(seed)
        points = places_beside(frame, reference)
        levels = rg.measure_levels(reference, points).levels
        found = rg.fit_beside_reference(rg.measure_levels(frame, points), levels).beside
        assert_allclose(found.scale, [0.8, 0.9, 1.1], rtol=0.02)
        off.append((found.scale - [0.8, 0.9, 1.1]) / found.error)
    # 18 values of variance one: their root mean square is within 0.5 and 1.6 but once in a thousand times.
    assert 0.5 < np.sqrt(np.mean(np.square(off))) < 1.6


def test_it_is_kriging_with_external_drift():
    """The same as one solution of all equations, with the reference's level as a term of the trend."""
    rng = np.random.default_rng(10)
    points = rg.make_points(np.unique(rng.integers(0, 500, (60, 2)), axis=0))
    light = rng.normal(0, 300, (len(points.x), 1))
    levels = 1000 + 0.5 * points.x[:, None] + 200 * np.sin(points.y[:, None] / 150) + 0.7 * light
    levels = levels + rng.normal(0, 2, levels.shape)
    found = rg.fit_beside_reference(measured(points, levels), light)
    assert found.beside.kept.all()
    model, centers = found.adaptive, points.centers

    def kernel(a):
        return np.sqrt(((a[:, None] - centers) ** 2).sum(axis=2) / model.epsilon**2 + 1)

    def terms(a):
        return np.hstack([np.ones((len(a), 1)), a])[:, :3 if model.trend == 'plane' else 1]

    drift = np.hstack([terms(centers), light - np.median(light)])
    n, n_terms = drift.shape
    matrix = np.block([[kernel(centers) - model.smooth * np.eye(n), drift], [drift.T, np.zeros((n_terms, n_terms))]])
    solution = np.linalg.solve(matrix, np.vstack([levels, np.zeros((n_terms, 1))]))
    assert_allclose(found.beside.scale, solution[-1], rtol=1e-5)
    at = rng.uniform(0, 500, (20, 2)).round()
    expected = kernel(at) @ solution[:n] + terms(at) @ solution[n:-1]
    rows = found.model.evaluate(0, 501, 501)
    # Both take turns until the scale stays to 1e-6: of 300 counts of light.
    assert_allclose(rows[at[:, 1].astype(int), at[:, 0].astype(int)], expected, rtol=0, atol=1e-3)


def test_bad_places_are_left_out():
    frame, reference, background = pair()
    points = places_beside(frame, reference)
    bad = np.random.default_rng(11).choice(len(points.x), 10, replace=False)
    for i in bad:  # satellites, moved objects
        x, y = points.x[i], points.y[i]
        reference[y - 6:y + 7, x - 6:x + 7] += 3000
    frame, reference = (rg.measure_levels(each, points, robust=False) for each in (frame, reference))
    found = rg.fit_beside_reference(frame, reference.levels)
    kept = found.beside.kept
    near = rg.distances_between(points.centers, points.centers[bad]).min(axis=1) < 30
    assert not kept[bad].any()
    assert (~kept & ~near).sum() <= 0.06 * len(points.x)
    assert error_of(found.model, background) < 10
    assert len(found.measured.levels) == kept.sum() == len(found.model.centers)


@pytest.mark.parametrize(('spoil', 'most'), [
    (lambda reference: shift(reference, (0, 2, 0), order=0, mode='nearest'), 40),
    (lambda reference: rotate(reference, 0.2, axes=(1, 0), reshape=False, order=1, mode='nearest'), 20),
    (lambda reference: gaussian_filter(reference, (2.2, 2.2, 0)), 10)])
def test_registration_need_not_be_perfect(spoil, most):
    """A shift by two pixels, a turn by 0.2 degrees, stars twice as wide, in a nebula of steep edges."""
    frame, reference, background = pair()
    assert error_of(beside(frame, spoil(reference.astype(float))).model, background) < most


@pytest.mark.parametrize('kind', ['gray', 'u1'])
def test_reference_of_another_kind(kind):
    frame, reference, background = pair()
    reference = {'gray': (reference.mean(axis=2) / 65535).astype(np.float32),
                 'u1': (reference // 40).clip(0, 255).astype(np.uint8)}[kind]
    assert error_of(beside(frame, reference).model, background) < (30 if kind == 'gray' else 8)


def test_gray_reference_of_a_gray_field_is_as_good():
    frame, reference, background = pair()
    assert error_of(beside(frame[..., 0], reference[..., 0]).model, background[..., :1]) < 4


def test_places_without_data_in_the_reference_are_left_out():
    frame, reference, _ = pair()
    reference[:, :150] = 0
    points = places_beside(frame, reference, 24)
    assert points.x.min() >= 150  # at least half of each window has data
    given = rg.make_points([(100, 100), (300, 300), (400, 200)])
    with pytest.raises(rg.RmgradientError, match=r'point \(100, 100\) has data at only 0 %'):  # certain ones are kept
        places_beside(frame, reference, 24, given)
    with pytest.raises(rg.RmgradientError, match='only 0 of .* quiet places have data'):
        places_beside(frame, 0 * reference, 24)


@pytest.mark.parametrize(('reference', 'match'), [
    (np.ones((400, 500, 3)), 'is 500 x 400 pixels and the picture 600 x 400; register it'),
    (np.ones((400, 600, 2)), 'has 2 channels and the picture 3'),
    (800 + field(99) + np.random.default_rng(1).normal(0, 10, (400, 600, 3)), r'correlate .* by .*0\.\d+.* only')])
def test_references_that_are_none(reference, match):
    with pytest.raises(rg.RmgradientError, match=match):
        beside(pair()[0], reference)


# ---- from the command line ------------------------------------------------------------------------------------------

@pytest.fixture
def two(cli):
    frame, reference, cli.background = pair()
    tifffile.imwrite('sky.tif', frame, photometric='rgb')
    tifffile.imwrite('best.tif', (reference / 65535).astype(np.float32), photometric='rgb')
    return cli


def test_command_line(two):
    assert two('-v', '--reference', 'best.tif', '-b', 'bg.tif', '--save-points', 'points', points=['-a']) == 0
    assert 'points fit the reference, whose scale is 5.24' in two.stderr  # 0.8 x 65535 is 52428
    assert 'is it registered' not in two.stderr
    off = (tifffile.imread('bg.tif') - two.background)[2::4, 2::4]
    assert (off.std(axis=(0, 1)) < 3).all()
    # The points that were saved are those that fit: -f with the same reference gives the same.
    assert two('--reference', 'best.tif', '-o', 'again.tif', points=['-f', 'points']) == 0
    assert np.abs(tifffile.imread('again.tif').astype(int) - tifffile.imread('out.tif')).max() <= 1


def test_command_line_errors(two):
    tifffile.imwrite('small.tif', np.ones((50, 50), np.uint8))
    two.fails('--reference', 'small.tif', points=['-a'], match='small.tif: is 50 x 50 pixels and the picture 600 x 400')
    two.fails('--reference', 'nowhere.tif', points=['-a'], match='nowhere.tif: No such file')
    tifffile.imwrite('other.tif', np.random.default_rng(1).normal(99, 5, (400, 600)).astype(np.float32))
    two.fails('--reference', 'other.tif', points=['-a'], match='other.tif: details correlate with those of the picture')
    two.fails('--reference', 'best.tif', '-m', '0.1', status=2, match='--reference needs --smooth auto')
    two.fails('-o', 'best.tif', '--overwrite', '--reference', 'best.tif', match='best.tif: is the input best.tif')
    empty = tifffile.imread('best.tif')
    empty[:, :100] = 0
    tifffile.imwrite('empty.tif', empty, photometric='rgb')
    two.fails('--reference', 'empty.tif', points=['-p', '90', '200', '300', '200', '400', '100'],
              match='empty.tif: point (90, 200) has data at only 12 % of what is averaged within 24 pixels')


def test_reference_that_is_not_registered(two):
    """A shift by eight pixels is told."""
    tifffile.imwrite('best.tif', np.roll(tifffile.imread('best.tif'), 8, axis=1), photometric='rgb')
    assert two('--reference', 'best.tif', points=['-a', '15']) == 0
    assert 'is it registered to the pixel?' in two.stderr


def test_few_points_tell_no_light_from_background(two):
    places = [(60, 60), (300, 60), (540, 60), (60, 340), (300, 340), (540, 340), (300, 200), (200, 150)]
    two.fails('--reference', 'best.tif', points=['-p', *words(places[:7])],
              match='best.tif: 7 points are too few to tell its light from the background; give at least 8')
    assert two('--reference', 'best.tif', points=['-p', *words(places)]) == 0


def test_session_gets_one_background(two):
    """Frames with moving glows: corrected beside the best one, their mean has its gradient, and no other."""
    (two.folder / 'night').mkdir()
    (two.folder / 'out').mkdir()
    rng = np.random.default_rng(20)
    best = 800 + field() + 300 * U[..., None]
    frames = [rng.uniform(0.7, 1.1) * field() + glow(rng) + rng.normal(0, 50, best.shape) for _ in range(4)]
    tifffile.imwrite('best.tif', np.rint(best + rng.normal(0, 50, best.shape)).astype(np.uint16), photometric='rgb')
    for i, frame in enumerate(frames):
        tifffile.imwrite(f'night/{i}.tif', np.rint(frame).astype(np.uint16), photometric='rgb')
    pictures = ['-i', *(f'night/{i}.tif' for i in range(4)), '-o', 'out', '-q']
    assert two(*pictures, '--reference', 'best.tif', points=['-a']) == 0

    def gradient_left(stack):
        """Return the RMS of what is neither the field nor the gradient of the best frame, blurred, in counts."""
        terms = np.stack([np.ones(X.size), gaussian_filter(field()[..., 0], 6).ravel(), U.ravel()], axis=1)[::7]
        values = gaussian_filter(stack[..., 0], 6).ravel()[::7]
        return (values - terms @ np.linalg.lstsq(terms, values, rcond=None)[0]).std()

    corrected = np.mean([tifffile.imread(f'out/{i}.tif').astype(float) for i in range(4)], axis=0)
    assert gradient_left(np.mean(frames, axis=0)) > 100
    assert gradient_left(corrected) < 5
    assert_array_equal(corrected.shape, best.shape)
