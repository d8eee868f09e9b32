# SPDX-License-Identifier: Apache-2.0
"""A picture beside a reference of the same field."""
import functools
import re
import sys

import numpy as np
import pytest
import tifffile
from helpers import measured, scatter, words
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import affine_transform, gaussian_filter, rotate, shift

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
    return rg.find_correction(frame, 'auto', reference=reference, **{'auto': 13, **more})  # fewer points are faster


def places_beside(frame, reference, n=15, given=None):
    return rg.places_with_reference(rg.as_picture(frame), n, 8.0, given)[0]


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
        found = rg.fit_with_reference(rg.measure_levels(frame, points), levels).reference
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
    found = rg.fit_with_reference(measured(points, levels), light)
    assert found.reference.kept.all()
    model, centers = found.adaptive, points.centers

    def kernel(a):
        return np.sqrt(((a[:, None] - centers) ** 2).sum(axis=2) / model.epsilon**2 + 1)

    def terms(a):
        return np.hstack([np.ones((len(a), 1)), a])[:, :3 if model.trend == 'plane' else 1]

    drift = np.hstack([terms(centers), light - np.median(light)])
    n, n_terms = drift.shape
    matrix = np.block([[kernel(centers) - model.smooth * np.eye(n), drift], [drift.T, np.zeros((n_terms, n_terms))]])
    solution = np.linalg.solve(matrix, np.vstack([levels, np.zeros((n_terms, 1))]))
    assert_allclose(found.reference.scale, solution[-1], rtol=1e-5)
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
    found = rg.fit_with_reference(frame, reference.levels)
    kept = found.reference.kept
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
    found = beside(frame, reference)
    assert found.points.x.min() >= 150  # at least half of each window has data
    reference[:, :210] = 0
    part = next(finding for finding in beside(frame, reference).findings if finding.kind == 'part')
    assert part.text.startswith('the reference has no data at the upper left, left, lower left')
    reference[:] = pair()[1]
    reference[:, :150] = 0
    given = [(100, 100), *scatter(HEIGHT, WIDTH, 20).tolist()]
    n_lost = sum(x < 148 for x, _ in given)
    found = rg.find_correction(frame, given, reference=reference)
    assert len(found.points.x) >= len(given) - n_lost - 2  # these may differ otherwise
    assert found.points.x.min() >= 148
    lost, = (finding for finding in found.findings if finding.kind == 'lost')
    assert lost.numbers['points'] == n_lost > 1
    with pytest.raises(rg.RmgradientError, match='only 0 of .* points have data in the picture and on the reference'):
        beside(frame, 0 * reference)


@pytest.mark.parametrize(('reference', 'match'), [
    (np.ones((400, 600, 2)), 'has 2 channels and the picture 3'),
    (800 + field(99) + np.random.default_rng(1).normal(0, 10, (400, 600, 3)), 'its stars are at other places'),
    (np.random.default_rng(1).normal(99, 5, (400, 600)), 'its details are not those of the picture')])
def test_references_that_are_none(reference, match):
    with pytest.raises(rg.RmgradientError, match=match):
        beside(pair()[0], reference)


@pytest.mark.parametrize(('levels', 'match'), [
    (np.ones((5, 2)), r'levels of a reference of shape \(5, 2\)'), ('x', 'are not numbers'),
    (np.full((30, 1), np.nan), 'not finite')])
def test_odd_levels_of_a_reference(levels, match):
    points = rg.make_points(scatter(n=30))
    with pytest.raises(rg.RmgradientError, match=match):
        rg.fit_with_reference(measured(points, np.ones((30, 3))), levels)


# ---- what real references are like ----------------------------------------------------------------------------------

def test_stars_of_other_colors_and_sizes():
    """They are left out of both pictures, as far as they stand out."""
    rng = np.random.default_rng(8)
    places = rng.integers(0, HEIGHT, 800), rng.integers(0, WIDTH, 800)
    stars = []
    for width in (1.2, 2.0):
        drawn = np.zeros((HEIGHT, WIDTH, 3))
        drawn[places] = 3000 * rng.pareto(1.2, (800, 1)).clip(0, 50) * rng.uniform(0.3, 1.5, (800, 3))
        stars.append(gaussian_filter(drawn, (width, width, 0)))
    frame, reference, background = pair()
    frame, reference = (each + light for each, light in zip((frame, reference), stars))
    assert error_of(beside(frame, reference).model, background) < 8


def test_field_of_stars_alone():
    """Without a nebula, only stars tell the scale."""
    rng = np.random.default_rng(9)
    stars = np.zeros((HEIGHT, WIDTH))
    stars[rng.integers(0, HEIGHT, 900), rng.integers(0, WIDTH, 900)] = 3000 * rng.pareto(1.2, 900).clip(0, 50)
    stars = gaussian_filter(stars, 1.3)[..., None]
    background = glow(rng)
    frame = background + 0.8 * stars + rng.normal(0, 50, background.shape)
    found = beside(frame, 800 + 100 * V[..., None] + stars + rng.normal(0, 10, background.shape))
    assert_allclose(found.fit.reference.scale, 0.8, rtol=0.03)
    assert error_of(found.model, background - 80 * V[..., None]) < 5


@pytest.mark.parametrize('spoil', [lambda blue: np.random.default_rng(1).normal(900, 200, blue.shape),
                                   lambda blue: 9000 - blue.astype(float)])
def test_channel_that_is_not_explained_is_named(spoil):
    frame, reference, background = pair()
    reference = reference.astype(float)
    reference[..., 2] = spoil(reference[..., 2])
    found = beside(frame, reference)
    channel, = (finding for finding in found.findings if finding.kind == 'channel')
    assert 'does not explain blue' in str(channel)
    assert found.fit.reference.scale[2] == 0
    errors = (found.model.evaluate(0, HEIGHT, WIDTH) - background)[2::4, 2::4].std(axis=(0, 1))
    assert (errors[:2] < 6).all()


def test_reference_that_is_the_picture_itself():
    frame, _, _ = pair()
    found = beside(frame, frame[..., 1])
    same, = (finding for finding in found.findings if finding.kind == 'same')
    assert 'green' in str(same)
    assert not [finding for finding in beside(*pair()[:2]).findings if finding.kind == 'same']


@pytest.mark.parametrize('curve', [lambda z: z**0.5, lambda z: np.arcsinh(z * 30) / 4.1])
def test_reference_that_is_stretched_is_told(curve):
    frame, reference, _ = pair()
    z = np.clip((reference - 700.0) / 8000, 0, 1)
    assert 'not linear' in [finding.kind for finding in beside(frame, 60000 * curve(z)).findings]
    assert not beside(frame, 60000 * z).findings


# ---- one level, and the same picture for the same points -------------------------------------------------------------

def test_all_frames_get_the_level_of_the_reference():
    rng = np.random.default_rng(7)
    reference = np.rint(800 + field() + rng.normal(0, 10, field().shape)).astype(np.uint16)
    dark = np.median(gaussian_filter(reference.astype(float), (3, 3, 0)), axis=(0, 1))
    for level, scale in ((600, 0.8), (1300, 1.1)):
        frame = np.rint(level + 900 * U[..., None] + scale * field() + rng.normal(0, 30, field().shape))
        found = beside(frame.astype(np.uint16), reference)
        assert_allclose(found.sky, found.fit.measured.reference.zero)
        left = found.apply(frame.astype(np.uint16)) - scale * (field() + 800 - dark) - dark
        assert np.abs(np.median(left, axis=(0, 1))).max() < 6
    gray = beside(frame.astype(np.uint16), reference.astype(np.float32)).sky  # of another type: as without a reference
    assert np.ptp(gray) == 0
    assert_array_equal(beside(frame.astype(np.uint16), reference, sky=900).sky, 900)


def test_the_same_points_give_the_same_picture():
    """The zero of the reference does not depend on the points, and those that were kept stay."""
    frame, reference, _ = pair()
    for kind in (reference, reference.astype(np.float32)):  # with its level, and with that of the points
        chosen = beside(frame, kind)
        again = rg.find_correction(frame, chosen.points, reference=kind)
        assert_array_equal(again.points.centers, chosen.points.centers)
        assert np.abs(again.apply(frame).astype(int) - chosen.apply(frame)).max() <= 1
        some = rg.find_correction(frame, scatter(HEIGHT, WIDTH, 60), reference=kind)
        assert_array_equal(some.fit.measured.reference.zero, chosen.fit.measured.reference.zero)


def test_isoline_of_a_point_that_is_left_out():
    frame, reference, _ = pair()
    places = [(float(x), float(y)) for x, y in scatter(HEIGHT, WIDTH, 120).tolist()]
    places[20:20] = [(300, 200), (-310, 230), (-330, 260)]
    reference[170:231, 270:331] += 3000  # something moved to the first point of an isoline
    found = rg.find_correction(frame, places, reference=reference)
    kept = {tuple(place) for place in found.points.centers.astype(int).tolist()}
    assert not kept & {(300, 200), (310, 230), (330, 260)}


# ---- references with other pixels ------------------------------------------------------------------------------------

def turned(picture, angle, scale, mirror=False):
    """Return a picture that is turned by degrees about its middle, scaled, and mirrored."""
    height, width = picture.shape[:2]
    a, size = np.radians(angle), np.array([round(height * scale), round(width * scale)])
    matrix = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) / scale
    if mirror:
        matrix = np.diag([1, -1]) @ matrix
    offset = (np.array([height, width]) - 1) / 2 - matrix @ ((size - 1) / 2)
    return np.stack([affine_transform(picture[..., c].astype(float), matrix, offset, tuple(size), order=1)
                     for c in range(picture.shape[2])], axis=2)


@pytest.mark.parametrize(('spoil', 'words_of_it'), [
    (lambda reference: turned(reference, 7, 0.8), r'registered by \d+ stars, magnified 0\.80\d\d times, turned by -?7'),
    (lambda reference: turned(reference, 3, 1.0, mirror=True), 'mirrored'),
    (lambda reference: reference[40:360, 50:550], 'by .* stars, magnified 1.000'),
    (lambda reference: turned(reference, -20, 2.5), '2.50')])
def test_reference_with_other_pixels(spoil, words_of_it):
    pytest.importorskip('astroalign')
    frame, reference, background = pair()
    found = beside(frame, spoil(reference))
    assert re.search(words_of_it, found.fit.measured.reference.where)
    assert not [finding for finding in found.findings if finding.kind in ('edge', 'step', 'corner', 'reference')]
    # Where the reference has data, away from its border: up to 1.7 times what the registered one gives.
    x, y = found.points.centers.T
    inside = np.s_[int(y.min()):int(y.max()), int(x.min()):int(x.max())]
    errors = (found.model.evaluate(0, HEIGHT, WIDTH) - background)[inside]
    assert errors.std(axis=(0, 1)).max() < 12


@pytest.mark.parametrize('pixels', [2, 9, 60])
def test_shifted_reference_needs_no_other_package(pixels, monkeypatch):
    monkeypatch.setitem(sys.modules, 'astroalign', None)
    frame, reference, background = pair()
    reference = shift(reference.astype(float), (0, pixels, 0), order=0, mode='nearest')
    found = beside(frame, reference)
    assert re.match(rf'shifted by up to {pixels}\.\d pixels \(\d+ stars\)', found.fit.measured.reference.where)
    assert error_of(found.model, background) < (5 if pixels < 10 else 12)


def test_without_the_package_the_way_out_is_told(two, monkeypatch):
    monkeypatch.setitem(sys.modules, 'astroalign', None)
    tifffile.imwrite('small.tif', turned(tifffile.imread('best.tif'), 7, 0.8).astype(np.float32), photometric='rgb')
    two.fails('--reference', 'small.tif', points=['-a'], match='small.tif: is not registered; register '
              'it, or let the program do it after: ')


def test_coordinates_in_the_sky(two):
    fits = pytest.importorskip('astropy.io.fits')

    def header(scale, angle, x, y):
        a = np.radians(angle)
        return fits.Header([('CTYPE1', 'RA---TAN'), ('CTYPE2', 'DEC--TAN'), ('CRVAL1', 83.0), ('CRVAL2', -5.0),
                            ('CRPIX1', x), ('CRPIX2', y), ('CD1_1', -scale * np.cos(a)), ('CD1_2', scale * np.sin(a)),
                            ('CD2_1', scale * np.sin(a)), ('CD2_2', scale * np.cos(a))])

    frame, reference, background = pair()
    fits.writeto('frame.fits', frame.transpose(2, 0, 1), header(1e-3, 0, 300.5, 200.5))
    small = turned(reference, 11, 0.8).astype(np.float32)
    fits.writeto('small.fits', small.transpose(2, 0, 1), header(1e-3 / 0.8, 11, 240.5, 160.5))
    options = ['-i', 'frame.fits', '-o', 'o.fits', '--reference', 'small.fits']
    assert two(*options, '-b', 'b.fits', points=['-a', '12']) == 0
    assert 'registered by coordinates (WCS), magnified 0.8 times' in two.stderr
    errors = fits.getdata('b.fits').transpose(1, 2, 0) - background
    assert errors[60:-60, 60:-60].std(axis=(0, 1)).max() < 10
    # A matrix that is singular, and a field elsewhere.
    for scale, other in ((0.0, 83.0), (1e-3, 200.0)):
        bad = header(scale, 0, 240.5, 160.5)
        bad['CRVAL1'] = other
        fits.writeto('small.fits', small.transpose(2, 0, 1), bad, overwrite=True)
        status = two(*options, '--overwrite', points=['-a', '12'])
        assert 'Traceback' not in two.stderr
        assert status == 0 or 'astroalign' in two.stderr
        assert '(WCS)' not in two.stderr or 'cannot be used' in two.stderr


def test_rows_counted_from_the_other_end(two):
    """A TIFF beside a FITS: as they are displayed."""
    fits = pytest.importorskip('astropy.io.fits')
    frame, reference, background = pair()
    fits.writeto('best.fits', reference[::-1].transpose(2, 0, 1))
    assert two('--reference', 'best.fits', '-b', 'bg.tif', points=['-a']) == 0
    assert (tifffile.imread('bg.tif') - background)[2::4, 2::4].std(axis=(0, 1)).max() < 5


def test_places_of_stars():
    rng = np.random.default_rng(3)
    x, y = rng.uniform(30, 570, 40), rng.uniform(30, 370, 40)
    sky = 1000 + rng.normal(0, 5, (HEIGHT, WIDTH))
    for i in range(40):
        sky += 900 * np.exp(-((X - x[i]) ** 2 + (Y - y[i]) ** 2) / 2 / 1.6**2)
    stars = rg.as_picture(sky).stars
    distances = rg.distances_between(np.stack([x, y], axis=1), stars).min(axis=1)
    assert np.quantile(distances, 0.8) < 0.2
    assert len(stars) <= 45


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
    two.fails('--reference', 'small.tif', points=['-a'], match='small.tif: ')
    two.fails('--reference', 'nowhere.tif', points=['-a'], match='nowhere.tif: No such file')
    tifffile.imwrite('other.tif', np.random.default_rng(1).normal(99, 5, (400, 600)).astype(np.float32))
    two.fails('--reference', 'other.tif', points=['-a'], match='other.tif: its details are not those of the picture')
    two.fails('--reference', 'best.tif', '-m', '0.1', status=2, match='--reference needs --smooth auto')
    two.fails('-o', 'best.tif', '--overwrite', '--reference', 'best.tif', match='best.tif: is the input best.tif')


def test_reference_that_does_not_fit_is_told(two):
    """Light that is in one of both."""
    best = tifffile.imread('best.tif')
    best[:, :300] += 0.3 * gaussian_filter(np.random.default_rng(4).normal(0, 1, (400, 300, 3)), (15, 15, 0))
    tifffile.imwrite('best.tif', best, photometric='rgb')
    assert two('--reference', 'best.tif', points=['-a', '15']) == 0
    assert 'is it registered, and in the same colors?' in two.stderr


def test_few_points_tell_no_light_from_background(two):
    places = [(60, 60), (300, 60), (540, 60), (60, 340), (300, 340), (540, 340), (300, 200), (200, 150)]
    two.fails('--reference', 'best.tif', points=['-p', *words(places[:7])],
              match='best.tif: 7 points are too few to separate its light from the background; give at least 8')
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


# ---- odd references -------------------------------------------------------------------------------------------------

def test_reference_of_the_other_row_order_serves_all_pictures(two):
    fits = pytest.importorskip('astropy.io.fits')
    frame, reference, _ = pair()
    (two.folder / 'out').mkdir()
    for name in ('a.fits', 'b.fits'):
        fits.writeto(name, frame.transpose(2, 0, 1))
    tifffile.imwrite('flipped.tif', reference[::-1], photometric='rgb')
    assert two('-i', 'a.fits', 'b.fits', '-o', 'out', '--reference', 'flipped.tif', points=['-a']) == 0


def test_coordinates_that_leave_the_map(two):
    """All of the sky: points outside of it have no coordinates."""
    fits = pytest.importorskip('astropy.io.fits')
    rng = np.random.default_rng(1)
    for name, (height, width) in (('a.fits', (300, 400)), ('b.fits', (280, 380))):
        cards = [('CTYPE1', 'RA---AIT'), ('CTYPE2', 'DEC--AIT'), ('CDELT1', -0.85), ('CDELT2', 0.85), ('CRVAL1', 0.0),
                 ('CRVAL2', 0.0), ('CRPIX1', width / 2), ('CRPIX2', height / 2)]
        fits.writeto(name, rng.normal(1000, 30, (height, width)).astype('f4'), fits.Header(cards))
    assert two('-i', 'a.fits', '-o', 'o.fits', '--reference', 'b.fits', points=['-a']) in (0, 1)
    assert all(line.startswith('rmgradient: ') for line in two.stderr.splitlines())


def test_hot_pixel_beside_a_reference():
    frame, reference, background = pair()
    frame = frame.astype(float)
    frame[205, 300] = 1e200
    assert error_of(beside(frame, reference).model, background) < 6
    reference = reference.astype(np.float32)
    reference[205, 300] = 3.4e38
    assert error_of(beside(pair()[0], reference).model, background) < 6


def test_broad_nebula_is_no_background():
    """It is smooth, too: without a start, all of it is taken for background, and the reference refused."""
    rng = np.random.default_rng(2)
    nebula = 500 * np.exp(-((X - 300) ** 2 + (Y - 200) ** 2) / 3.4e4)
    frame, reference = 2000 + nebula + 0.2 * X + rng.normal(0, 35, X.shape), 1500 + nebula + rng.normal(0, 35, X.shape)
    found = beside(frame, reference)
    assert_allclose(found.fit.reference.scale, 1, rtol=0.05)
    assert not found.findings


def test_level_of_a_reference_on_another_scale_is_not_taken():
    frame, reference, _ = pair()
    found = beside((frame / 65535).astype(np.float32), reference.astype(np.float32))
    assert (found.sky < 0.1).all()
