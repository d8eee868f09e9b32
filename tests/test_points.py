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
    ('1 2 3', 'the number of coordinates is odd: the last one, 3, has no partner'),
    ('1 two', "'two' is not a number of pixels"),
    ('1 1e3', "'1e3' is not a number of pixels"),
    ('1 ٣', 'is not a number of pixels'),  # Arabic digit: int() would take it
    ('1 99999999999999999999', 'is not a number of pixels'),
    ('1 2;nan', "'nan' is not a number of pixels"),
    ('1 2 -', "'-' is not a number of pixels"),
])
def test_words_that_are_not_pairs(text, match):
    with pytest.raises(rg.RmgradientError, match=match):
        rg.parse_coordinates(text.split())


@pytest.mark.parametrize(('pairs', 'match'), [
    ([], 'no points'),
    ([(-1, 2), (3, 4), (5, 6)], 'first point has a minus sign'),
    ([(-0.0, 2), (3, 4), (5, 6)], 'first point has a minus sign'),
    ([(1, 2), (3, 4)], 'too few points, 2; give at least three'),
    ([(1, 2), (3, 4), (1, 2), (5, 6)], r'point \(1, 2\), number 3, repeats number 1'),
    ([(1, 2), (3, 4), (5, 6), (-3, 4)], r'point \(3, 4\), number 4, repeats number 2'),
    ([(1, 2), (3, np.nan), (5, 6)], 'numbers of pixels'),
    ([(1, 2), (3, np.inf), (5, 6)], 'numbers of pixels'),
    ([1, 2, 3], 'pairs of coordinates'),
    ([(1, 2, 3)], 'pairs of coordinates'),
])
def test_pairs_that_are_not_points(pairs, match):
    with pytest.raises(rg.RmgradientError, match=match):
        rg.make_points(pairs)


def test_points_file():
    lines = ['# picked by hand\n', '\n', '10 20\n', '  30\t40 1234 brightness, a comment\n', '-0 5#isoline\n', '-7 8']
    pairs, numbers = rg.parse_points_file(lines)
    assert pairs.tolist() == [[10, 20], [30, 40], [-0.0, 5], [-7, 8]]
    assert np.signbit(pairs[2, 0])
    assert numbers == [3, 4, 5, 6]


@pytest.mark.parametrize('text', ['10,20 30,40', '(10, 20) (30, 40)', '[10 20] [30 40]', '10.0 20.4 29.6 40',
                                  '10, 20; 30, 40', '[[10, 20], [30, 40]]'])
def test_coordinates_as_programs_write_them(text):
    assert rg.parse_coordinates(text.split()).tolist() == [[10, 20], [30, 40]]
    lines = [text.split('30')[0], '30' + text.split('30')[1]] if '30' in text else text.rsplit('29', 1)
    lines = [lines[0], lines[1] if '30' in text else '29' + lines[1]]
    assert rg.parse_points_file(lines)[0].tolist() == [[10, 20], [30, 40]]


def test_signs_of_decimals():
    assert np.signbit(rg.parse_coordinates('-0.2 5 3 -0'.split())).tolist() == [[True, False], [False, True]]


def test_one_number_a_line():
    pairs, numbers = rg.parse_points_file('# x and y\n10\n20\n\n-30\n40\n'.split('\n'))
    assert pairs.tolist() == [[10, 20], [-30, 40]]
    assert numbers == [2, 5]
    with pytest.raises(rg.RmgradientError, match='line 3: the number of coordinates is odd'):
        rg.parse_points_file(['1', '2', '3'])


def test_sources_are_one_for_each_point():
    with pytest.raises(rg.RmgradientError, match='1 sources for 3 points; give one for each, or none'):
        rg.make_points([(1, 2), (3, 4), (1, 2)], sources=['a'])


def test_what_is_needed_is_said():
    with pytest.raises(rg.RmgradientError, match='no points; give at least three'):
        rg.make_points([])
    with pytest.raises(rg.RmgradientError, match='no points; give at least one'):
        rg.choose_points(np.ones((200, 300)), given=[])
    with pytest.raises(rg.RmgradientError, match='a surface needs at least two points'):
        rg.fit_background(rg.measure_levels(np.ones((200, 300)), rg.make_points([(90, 90)], least=1)))


def test_one_point_is_enough_beside_others():
    assert len(rg.make_points([(1, 2)], least=1).x) == 1
    with pytest.raises(rg.RmgradientError, match='no points'):
        rg.make_points([], least=1)


def test_messages_name_all_points_and_their_lines():
    pairs = [(30, 30), (500, 30), (40, 40), *((600 + i, 20) for i in range(6))]
    points = rg.make_points(pairs, [f'sky_points, line {i}' for i in range(len(pairs))])
    with pytest.raises(rg.RmgradientError) as caught:
        rg.check_points(points, 100, 200, 5)
    assert str(caught.value) == (
        'points (500, 30) in sky_points, line 1, (600, 20) in sky_points, line 3, (601, 20) in sky_points, line 4, '
        '(602, 20) in sky_points, line 5, (603, 20) in sky_points, line 6 and 2 more are outside of the picture, '
        '200 x 100 pixels')
    with pytest.raises(rg.RmgradientError, match='outside of the picture, 200 x 100 pixels: are x and y swapped'):
        rg.check_points(rg.make_points([(30, 150), (99, 199), (5, 3)]), 100, 200, 1)
    kept = points.subset(np.arange(len(pairs)) % 2 == 1)
    assert kept.sources[0] == 'sky_points, line 1'
    beside = points._replace(sources=('mine, line 7', *[''] * (len(pairs) - 1)))  # the others were chosen
    assert beside.describe([0, 1]) == 'points (30, 30) in mine, line 7, (500, 30)'
    assert len(kept.sources) == len(kept.x)


@pytest.mark.parametrize(('line', 'match'), [('12', 'line 2: the number of coordinates is odd'),
                                             ('12, b', "line 2: coordinate 'b' is not a number of pixels")])
def test_points_file_names_the_line(line, match):
    with pytest.raises(rg.RmgradientError, match=match):
        rg.parse_points_file(['10 20', line])


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.booleans()), min_size=3, max_size=40,
                unique_by=lambda point: point[:2]))
def test_points_survive_a_file(drawn):
    pairs = [(-float(x), y) if signed and i else (x, y) for i, (x, y, signed) in enumerate(drawn)]
    points = rg.make_points(pairs)
    for again in (rg.parse_points_file(rg.format_points_file(points))[0], points.pairs):
        for one, other in zip(points[:3], rg.make_points(again)):
            assert one.tolist() == other.tolist()


def test_border_is_exact():
    def check(x, y, radius=24, height=100, width=200):
        rg.check_points(rg.make_points([(x, y), (50, 50), (60, 60)]), height, width, radius)

    for place in [(24, 24), (175, 75)]:
        check(*place)
    for place in [(23, 40), (176, 40), (40, 23), (40, 76)]:
        with pytest.raises(rg.RmgradientError, match='within 24 pixels of the border; use a smaller sigma or move it'):
            check(*place)
    for place in [(200, 40), (40, 100)]:
        with pytest.raises(rg.RmgradientError, match='outside of the picture, 200 x 100 pixels'):
            check(*place)


def test_isoline_may_touch_the_border_but_not_leave():
    rg.check_points(rg.make_points([(50, 50), (-0.0, 0), (-199, 99)]), 100, 200, 24)
    with pytest.raises(rg.RmgradientError, match='outside'):
        rg.check_points(rg.make_points([(50, 50), (-0.0, 0), (-200, 99)]), 100, 200, 24)


def test_decimals_are_rounded_as_on_the_command_line():
    pairs = [(1.5, 2.49), (-3.51, 4.5), (5.5, 6.0)]
    words = ' '.join(f'{x} {y}' for x, y in pairs).split()
    for one, other in zip(rg.make_points(pairs)[:3], rg.make_points(rg.parse_coordinates(words))):
        assert one.tolist() == other.tolist()
    with pytest.raises(rg.RmgradientError, match='repeats'):
        rg.make_points([(1.1, 2), (1, 2.2), (5, 6)])
