# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rmgradient as rg


def test_isolines_take_the_last_point_without_a_sign():
    points = rg.make_points([(1, 2), (-3, 4), (5, -6), (7, 8), (-9, -10)])
    assert points.x.tolist() == [1, 3, 5, 7, 9]
    assert points.y.tolist() == [2, 4, 6, 8, 10]
    assert points.leader.tolist() == [0, 0, 0, 3, 3]
    assert points.on_isoline.tolist() == [False, True, True, False, True]


def test_minus_zero_is_on_an_isoline():
    points = rg.make_points(rg.parse_coordinates('30 30 -0 5 6 -0 40 40'.split()))
    assert points.on_isoline.tolist() == [False, True, True, False]
    assert points.x.tolist() == [30, 0, 6, 40]


@pytest.mark.parametrize(('text', 'match'), [
    ('1 2 3', '3 coordinates are not pairs: the last one, 3, has no partner'),
    ('1 2.5', "'2.5' is not a whole number"),
    ('1 two', "'two' is not a whole number"),
    ('1 1e3', "'1e3' is not a whole number"),
    ('1 ٣', 'is not a whole number'),  # Arabic digit: int() would take it
    ('1 99999999999999999999', 'is not a whole number'),
])
def test_words_that_are_not_pairs(text, match):
    with pytest.raises(rg.RmgradientError, match=match):
        rg.parse_coordinates(text.split())


@pytest.mark.parametrize(('pairs', 'match'), [
    ([], 'no points'),
    ([(-1, 2), (3, 4), (5, 6)], 'first point has a minus sign'),
    ([(-0.0, 2), (3, 4), (5, 6)], 'first point has a minus sign'),
    ([(1, 2), (3, 4)], 'too few points, 2; give at least three'),
    ([(1, 2), (3, 4), (1, 2), (5, 6)], r'point 3 repeats point 1, \(1, 2\)'),
    ([(1, 2), (3, 4), (5, 6), (-3, 4)], r'point 4 repeats point 2, \(3, 4\)'),
    ([(1, 2), (3, 4.5), (5, 6)], 'whole numbers'),
    ([(1, 2), (3, np.nan), (5, 6)], 'whole numbers'),
    ([(1, 2), (3, np.inf), (5, 6)], 'whole numbers'),
    ([1, 2, 3], 'pairs of coordinates'),
    ([(1, 2, 3)], 'pairs of coordinates'),
])
def test_pairs_that_are_not_points(pairs, match):
    with pytest.raises(rg.RmgradientError, match=match):
        rg.make_points(pairs)


def test_points_file():
    lines = ['# picked by hand\n', '\n', '10 20\n', '  30\t40 1234 brightness, a comment\n', '-0 5#isoline\n', '-7 8']
    assert rg.parse_points_file(lines).tolist() == [[10, 20], [30, 40], [-0.0, 5], [-7, 8]]
    assert np.signbit(rg.parse_points_file(lines)[2, 0])


@pytest.mark.parametrize(('line', 'match'), [('12', 'line 2: 1 coordinates are not pairs'),
                                             ('12, 13', "line 2: coordinate '12,' is not a whole number")])
def test_points_file_names_the_line(line, match):
    with pytest.raises(rg.RmgradientError, match=match):
        rg.parse_points_file(['10 20', line])


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.booleans()), min_size=3, max_size=40,
                unique_by=lambda point: point[:2]))
def test_points_survive_a_file(drawn):
    pairs = [(-float(x), y) if signed and i else (x, y) for i, (x, y, signed) in enumerate(drawn)]
    points = rg.make_points(pairs)
    again = rg.make_points(rg.parse_points_file(rg.format_points(points)))
    for one, other in zip(points, again):
        assert one.tolist() == other.tolist()


def test_border_is_exact():
    def check(x, y, radius=24, height=100, width=200):
        rg.check_points(rg.make_points([(x, y), (50, 50), (60, 60)]), height, width, radius)

    for place in [(24, 24), (175, 75)]:
        check(*place)
    for place in [(23, 40), (176, 40), (40, 23), (40, 76)]:
        with pytest.raises(rg.RmgradientError, match='within 24 pixels of the border; lower --sigma or move it'):
            check(*place)
    for place in [(200, 40), (40, 100)]:
        with pytest.raises(rg.RmgradientError, match='outside of the picture, 200 x 100 pixels'):
            check(*place)


def test_isoline_may_touch_the_border_but_not_leave():
    rg.check_points(rg.make_points([(50, 50), (-0.0, 0), (-199, 99)]), 100, 200, 24)
    with pytest.raises(rg.RmgradientError, match='outside'):
        rg.check_points(rg.make_points([(50, 50), (-0.0, 0), (-200, 99)]), 100, 200, 24)
