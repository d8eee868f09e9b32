# SPDX-License-Identifier: Apache-2.0
"""Points set by hand: what can be done to them, and the window, with events of matplotlib and of a real screen."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tifffile
from helpers import ROOT
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.collections import EllipseCollection
from numpy.testing import assert_allclose, assert_array_equal

import rmgradient as rg

HEIGHT, WIDTH = 400, 600


def signs(pairs):
    return np.signbit(pairs).any(axis=1).tolist()


# ---- what can be done to points -------------------------------------------------------------------------------------

PAIRS = np.array([[10, 20], [-30, -40], [-0.0, -5], [60, 70], [80, 90]])


def test_remove_hands_the_isoline_on():
    assert rg.remove_pair(PAIRS, 3).tolist() == PAIRS[[0, 1, 2, 4]].tolist()
    rest = rg.remove_pair(PAIRS, 0)
    assert rest[0].tolist() == [30, 40]
    assert signs(rest) == [False, True, False, False]
    assert signs(rg.remove_pair(PAIRS, 1)) == [False, True, False, False]
    assert signs(rg.remove_pair(PAIRS, 4)) == [False, True, True, False]


# ---- the window, with events of matplotlib's own --------------------------------------------------------------------

class Hand:
    """Does to an editor what a user does; the timer of a canvas without a screen never fires, so `settle` stands in."""

    def __init__(self, editor):
        self.editor, self.canvas = editor, editor.figure.canvas
        self.canvas.draw()
        self.canvas.draw_idle = lambda: None  # nobody looks

    def _mouse(self, name, x, y, button=None, key=None):
        at = self.editor.left.transData.transform([x, y])
        event = MouseEvent(name, self.canvas, *at, button, key)
        self.canvas.callbacks.process(name, event)

    def click(self, x, y, button=1, key=None):
        self._mouse('button_press_event', x, y, button, key)
        self._mouse('button_release_event', x, y, button, key)
        self.editor.update()

    def drag(self, *places):
        self._mouse('button_press_event', *places[0], 1)
        for place in places[1:]:
            self._mouse('motion_notify_event', *place)
        self._mouse('button_release_event', *places[-1], 1)
        self.editor.update()

    def press(self, key, x=300, y=200):
        at = self.editor.left.transData.transform([x, y])
        self.canvas.callbacks.process('key_press_event', KeyEvent('key_press_event', self.canvas, key, *at))
        self.said = self.status
        self.editor.update()

    def set(self, places):
        self.editor.pairs = np.array(places, float)
        self.editor.update()

    @property
    def status(self):
        return self.editor.status.get_text()

    @property
    def title(self):
        return self.editor.left.get_title()


@pytest.fixture
def sky():
    return tifffile.imread(ROOT / 'test_data' / 'sky.tif')


def picture_of(array):
    picture = rg.as_picture(array)
    picture.path = 'sky.tif'
    return picture


@pytest.fixture
def hand(sky):
    matplotlib.use('Agg')
    saved = []

    def save(points):
        saved.append(points)
        return 'my_points'
    editor = rg.Editor(picture_of(sky), [], rg.Settings(), save)
    hand = Hand(editor)
    hand.saved = saved
    yield hand
    plt.close('all')


PLACES = [(40, 40), (300, 40), (560, 60), (50, 350), (300, 370), (550, 360), (120, 200)]


def test_points_are_added_moved_removed_undone_and_redone(hand):
    assert 'no points' in hand.status
    for place in PLACES:
        hand.click(*place)
    assert hand.editor.pairs.tolist() == [list(place) for place in PLACES]
    hand.drag((120, 200), (125, 180), (60, 190), (130, 150))
    assert hand.editor.pairs[6].tolist() == [130, 150]
    hand.click(300, 40, button=3)
    assert [300, 40] not in hand.editor.pairs.tolist()
    hand.press('delete', 560, 60)
    assert len(hand.editor.pairs) == 5
    hand.press('delete', 200, 200)  # nothing there
    for _ in range(3):
        hand.press('ctrl+z')
    assert hand.editor.pairs.tolist() == [list(place) for place in PLACES]
    hand.press('ctrl+y')
    assert hand.editor.pairs[6].tolist() == [130, 150]
    for _ in range(12):
        hand.press('ctrl+z')
    assert len(hand.editor.pairs) == 0
    hand.press('ctrl+shift+z')
    hand.click(200, 100)
    hand.press('ctrl+y')  # nothing to redo after a change
    assert len(hand.editor.pairs) == 2


def test_background_is_that_of_the_points(hand, sky):
    hand.set(PLACES)
    expected = rg.find_correction(sky, PLACES).model
    shown = hand.editor.correction.model.evaluate(0, HEIGHT, WIDTH)
    assert_allclose(shown, expected.evaluate(0, HEIGHT, WIDTH), rtol=1e-9)
    assert 'result' in hand.editor.right.get_title()
    result = hand.editor.right.images[0].get_array()
    assert_allclose(result, 255 * rg.stretch_midtones(sky - expected.evaluate(0, HEIGHT, WIDTH)), atol=4)
    hand.press('v')
    assert 'background' in hand.editor.right.get_title()
    background = rg.stretch_midtones(expected.evaluate(0, HEIGHT, WIDTH), sky.astype(float))
    assert_allclose(hand.editor.right.images[0].get_array(), 255 * background, atol=1)


def test_isoline_by_shift(hand):
    hand.click(40, 40)
    hand.click(300, 3, key='shift')  # may touch the border
    hand.click(560, 60)
    hand.click(300, 370)
    assert signs(hand.editor.pairs) == [False, True, False, False]
    assert hand.editor.unusable == {}
    points = hand.editor.points()
    assert points.leader.tolist() == [0, 0, 2, 3]
    hand.click(40, 40, button=3)
    assert signs(hand.editor.pairs) == [False, False, False]
    assert 'within 24 pixels of the border' in hand.editor.unusable[0]


def test_what_can_not_be_used_is_said(hand):
    hand.set(PLACES)
    hand.click(5, 200)
    assert hand.editor.unusable == {7: 'is within 24 pixels of the border'}
    assert 'point 8 at (5, 200) is within 24 pixels' in hand.status
    assert len(hand.editor.points().x) == 7
    rings = hand.editor.left.collections[1]
    colors = rings.get_edgecolors()
    red = (colors == [1, 0, 0, 1]).all(axis=1)
    assert red.tolist() == [False] * 7 + [True]
    hand.drag((5, 200), (40, 200))
    assert hand.editor.unusable == {}
    hand.drag((40, 200), (300, 40))
    assert hand.editor.unusable == {7: 'repeats another point'}


def test_misfits_are_shown_and_stay(hand):
    hand.editor.pairs = np.array([(x, y) for x in range(40, 600, 75) for y in range(40, 400, 80)
                                  if np.hypot((x - 390) / 1.5, y - 190) > 110], float)
    hand.editor.update()
    hand.click(390, 190)  # the nebula
    last = len(hand.editor.pairs) - 1
    assert last in hand.editor.misfits
    assert 'does not fit the others' in hand.status
    assert len(hand.editor.points().x) == last + 1


def test_automatic_points_around_those_set(hand):
    hand.set(PLACES[:4])
    hand.press('a')
    assert hand.editor.pairs[:4].tolist() == [list(place) for place in PLACES[:4]]
    assert len(hand.editor.pairs) > 60
    hand.press('ctrl+z')
    assert len(hand.editor.pairs) == 4


def test_automatic_points_around_a_single_one(hand):
    hand.click(100, 100)
    hand.press('a')
    assert hand.editor.pairs[0].tolist() == [100, 100]
    assert len(hand.editor.pairs) > 60


def test_removed_while_it_is_dragged(hand):
    hand.set(PLACES)
    hand._mouse('button_press_event', *PLACES[-1], 1)
    hand._mouse('motion_notify_event', 130, 210)
    hand.press('delete', 130, 210)
    hand._mouse('motion_notify_event', 140, 220)
    hand._mouse('button_release_event', 140, 220, 1)
    assert len(hand.editor.pairs) == len(PLACES) - 1
    hand.press('ctrl+z')
    assert np.abs(hand.editor.pairs[-1] - [130, 210]).max() <= 1


def test_clicks_outside_of_the_picture_set_nothing(hand):
    hand.editor.left.set_xlim(-200, 700)
    hand.click(-60, 100)
    hand.click(650, 100)
    assert len(hand.editor.pairs) == 0


def test_keys_before_the_timer_fires(hand):
    """A bad point is removed, or set, and Enter comes at once: what can be used is judged anew."""
    hand.set([(5, 5), *PLACES])
    hand._mouse('button_press_event', 5, 5, 3)
    hand.canvas.callbacks.process('key_press_event', KeyEvent('key_press_event', hand.canvas, 'enter', 0, 0))
    assert hand.editor.accepted
    assert hand.editor.points().centers.tolist() == [list(place) for place in PLACES]


def test_title_tells_what_is_not_saved(hand):
    hand.set(PLACES)
    assert hand.title == 'sky.tif - points not saved'
    hand.press('s')
    assert hand.title == 'sky.tif'
    saved, = hand.saved
    assert saved.x.tolist() == [x for x, _ in PLACES]
    hand.drag((120, 200), (125, 180))
    assert 'not saved' in hand.title
    hand.press('ctrl+z')
    assert 'not saved' not in hand.title


def test_enter_needs_points_and_escape_leaves(hand):
    hand.press('enter')
    assert not hand.editor.accepted
    hand.set(PLACES)
    hand.press('escape')
    assert 'points are not saved: press s to save them, or Escape again to close' in hand.said
    assert plt.fignum_exists(hand.editor.figure.number)
    hand.click(200, 300)  # after any change it is asked anew
    hand.press('escape')
    assert plt.fignum_exists(hand.editor.figure.number)
    hand.press('escape')
    assert not hand.editor.accepted
    assert not plt.fignum_exists(hand.editor.figure.number)
    hand.press('enter')
    assert hand.editor.accepted


def test_zoom_shows_the_pixels(sky):
    matplotlib.use('Agg')
    large = np.kron(sky, np.ones((5, 5, 1), np.uint16))
    editor = rg.Editor(picture_of(large), [], rg.Settings(), None)
    assert editor.left.images[0].get_array().shape[:2] == (400, 600)
    editor.left.set_xlim(1000, 1200)
    editor.left.set_ylim(1100, 1000)
    editor.update()
    shown = editor.left.images[0]
    left, right, bottom, top = shown.get_extent()
    assert shown.get_array().shape[:2] == (101, 201)
    assert (left, right, bottom, top) == (999.5, 1200.5, 1100.5, 999.5)
    whole = rg.read_binned(rg.as_picture(large), n=700).values
    expected = rg.stretch_midtones(large[1000:1101, 1000:1201].astype(float), whole)
    assert_allclose(shown.get_array(), 255 * expected, atol=1)
    plt.close('all')


def test_only_new_levels_are_measured_and_one_refit_waits(hand, monkeypatch):
    hand.set(PLACES)
    measured, real, started = [], rg.measure_window, []

    def watch(picture, place, *more):
        measured.append(place)
        return real(picture, place, *more)
    monkeypatch.setattr(rg, 'measure_window', watch)
    monkeypatch.setattr(hand.editor.timer, 'start', lambda: started.append(1))
    hand.drag((120, 200), *((120 + i, 200) for i in range(1, 50)))
    assert measured == [(169, 200)]  # at the end; the fifty steps between only set the timer anew
    assert len(started) >= 49
    assert hand.editor.timer.single_shot


def test_masked_areas_are_shown(sky):
    matplotlib.use('Agg')
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[100:250, 250:500] = True
    picture = rg.as_picture(sky, mask)
    picture.path = 'sky.tif'
    editor = rg.Editor(picture, [*PLACES, (400, 200)], rg.Settings(), None)
    shown = editor.left.images[0].get_array().astype(int)
    plain = 255 * rg.stretch_midtones(sky.astype(float))
    tinted = np.abs(shown - plain).max(axis=2) > 20
    assert_array_equal(tinted, mask)
    assert editor.unusable == {7: 'is in the mask'}
    plt.close('all')


def test_gray_pictures_and_other_methods(sky):
    matplotlib.use('Agg')
    for method, level in (('divide', None), ('stretch', 'darkest'), ('subtract', 3000.0)):
        editor = rg.Editor(picture_of(sky[..., :1]), PLACES, rg.Settings(method=method, sky=level), None)
        assert editor.right.images[0].get_array().shape == (HEIGHT, WIDTH)
        assert 'result' in editor.right.get_title()
    plt.close('all')


# ---- from the command line ------------------------------------------------------------------------------------------

def test_without_display_or_toolkit(cli, monkeypatch):
    for name in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, 'platform', 'linux')
    cli.fails('--edit', points=[], match='--edit needs a display; without one, MPLBACKEND=WebAgg uses a browser')
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    cli.fails('--edit', points=[], match='--edit cannot use MPLBACKEND=Agg')
    monkeypatch.delenv('MPLBACKEND')
    monkeypatch.setenv('DISPLAY', ':98765')
    monkeypatch.setattr(rg.importlib.util, 'find_spec', lambda name: name != '_tkinter' or None)
    cli.fails('--edit', points=[], match='--edit needs a toolkit for windows; run: apt install python3-tk, or: ')
    monkeypatch.setattr(rg.importlib.util, 'find_spec', lambda name: True)
    cli.fails('--edit', points=[], match='--edit cannot open the display :98765')
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    cli.fails('--edit', points=[], match=f'error: matplotlib is missing; run: {rg.how_to_install("matplotlib")}')


@pytest.fixture
def scripted(cli, sky, monkeypatch):
    """Run --edit with a user who is a function of the editor's hand."""
    matplotlib.use('Agg')
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    monkeypatch.setattr(rg, 'choose_toolkit', lambda: None)
    editors, real = [], rg.Editor
    monkeypatch.setattr(rg, 'Editor', lambda *some, **more: editors.append(real(*some, **more)) or editors[-1])

    def run(user, *arguments, points=(), output=True):
        monkeypatch.setattr(plt, 'show', lambda block: user(Hand(editors[-1])))
        return cli(*arguments, '--edit', points=list(points)) if output else rg.main(['-i', 'sky.tif', '--edit'])
    run.cli = cli
    yield run
    plt.close('all')


def test_result_is_that_of_the_saved_points(scripted):
    def user(hand):
        assert hand.editor.pairs.tolist() == [[100, 100], [200, 200], [300, 100]]
        for place in PLACES[:3]:
            hand.click(*place)
        hand.press('enter')
    assert scripted(user, '--save-points', 'points', points=['-p', *'100 100 200 200 300 100'.split()]) == 0
    cli = scripted.cli
    assert cli('-o', 'again.tif', points=['-f', 'points']) == 0
    assert (cli.folder / 'again.tif').read_bytes() == (cli.folder / 'out.tif').read_bytes()
    assert cli.files() == ['again.tif', 'out.tif', 'points', 'sky.tif']


def test_points_file_edited_in_place(scripted):
    (scripted.cli.folder / 'mine').write_text('\n'.join(f'{x} {y}' for x, y in PLACES))

    def user(hand):
        hand.click(200, 300)
        hand.click(5, 200)  # too close to the border
        hand.press('enter')
    assert scripted(user, '--save-points', 'mine', '--overwrite', points=['-f', 'mine']) == 0
    assert '1 points that cannot be used are left out' in scripted.cli.stderr
    assert len(rg.parse_points_file((scripted.cli.folder / 'mine').read_text().splitlines())[0]) == 8
    scripted.cli.fails('--edit', '--reference', 'sky.tif', points=[], status=2, match='use one of them')


def test_nan_is_shown_without_a_word(sky):
    matplotlib.use('Agg')
    holey = sky.astype(np.float32)
    holey[:, :30] = np.nan
    editor = rg.Editor(picture_of(holey), PLACES, rg.Settings(), None)
    assert (editor.left.images[0].get_array()[:, :30] == 0).all()
    plt.close('all')


def test_escape_writes_nothing_but_what_was_saved(scripted):
    def user(hand):
        hand.set(PLACES)
        hand.press('s')
        hand.press('s')
        hand.press('escape')
    assert scripted(user) == 0
    assert scripted.cli.stderr.endswith('sky_points.txt: written\nrmgradient: sky.tif: closed; '
                                        'only the points are written\n')
    assert scripted.cli.files() == ['sky.tif', 'sky_points.txt']

    def other(hand):
        hand.press('a')
        hand.press('s')
        assert 'sky_points.txt exists, press s again to replace it' in hand.said
        hand.press('escape')
        hand.press('escape')
    assert scripted(other) == 0
    before = (scripted.cli.folder / 'sky_points.txt').read_bytes()

    def third(hand):
        hand.set(PLACES[:4])
        hand.press('s')
        assert (scripted.cli.folder / 'sky_points.txt').read_bytes() == before
        hand.press('s')
        assert (scripted.cli.folder / 'sky_points.txt').read_text().count('\n') == 5
        hand.press('escape')
    assert scripted(third) == 0
    assert scripted(lambda hand: hand.press('escape')) == 0
    assert scripted.cli.stderr.endswith('sky.tif: closed; nothing written\n')


def test_enter_without_an_output_saves_the_points(scripted):
    def user(hand):
        hand.set(PLACES)
        hand.press('enter')
    assert scripted(user) == 0  # with -o: the picture, and no points
    assert scripted.cli.files() == ['out.tif', 'sky.tif']
    assert scripted(user, output=False) == 0
    assert scripted.cli.files() == ['out.tif', 'sky.tif', 'sky_points.txt']
    said = scripted.cli.capsys.readouterr().err
    assert 'without -o no picture is written; Enter saves the points' in said
    assert 'sky_points.txt: written\n' in said


def test_result_is_what_the_window_showed(scripted, sky):
    """Also of the classic model, whose levels are plain means: a star near a point counts."""
    starry = sky.copy()
    starry[195:206, 115:126] = 60000
    tifffile.imwrite('sky.tif', starry, photometric='rgb')
    levels = []

    def user(hand):
        levels.append(hand.editor.correction.levels)
        hand.press('enter')
    for smooth in ('0.1', 'auto'):
        assert scripted(user, '-m', smooth, '--overwrite', '--report', 'report.json',
                        points=['-p', *(str(x) for place in PLACES for x in place)]) == 0
        report = json.loads((scripted.cli.folder / 'report.json').read_text())
        assert_allclose(levels[-1], report['levels'], rtol=1e-12)
    assert (levels[0][-1] > levels[1][-1] + 1000).all()


def test_advice_that_the_window_can_not_follow_is_not_shown(hand):
    """Such as another sigma, which is an option."""
    hand.set([*PLACES, (5, 5)])
    assert 'sigma' not in hand.status
    hand.set([])
    hand.editor.settings = rg.Settings(auto=3, sigma=60)
    hand.press('a')
    assert 'too few quiet places with data' in hand.said
    assert 'sigma' not in hand.said


def test_window_fits_a_small_screen_and_titles_stay(hand):
    """1366 x 768, less the bars of a desktop and of the window."""
    figure = hand.editor.figure
    width, height = figure.get_size_inches() * figure.dpi
    assert width <= 1300
    assert height <= 620
    for x, y in (((100, 130), (300, 10)), ((100, 400), (210, 200)), ((0, 600), (400, 0))):
        hand.editor.left.set_xlim(x)
        hand.editor.left.set_ylim(y)
        figure.canvas.draw()
        hand.editor.update()
        for axes in (hand.editor.left, hand.editor.right):
            box = axes.title.get_window_extent()
            assert box.y0 >= 0
            assert box.y1 <= height


def test_zoomed_result_is_that_of_the_pixels(sky):
    matplotlib.use('Agg')
    large = np.kron(sky, np.ones((5, 5, 1), np.uint16))
    places = 5 * np.array(PLACES)
    editor = rg.Editor(picture_of(large), places, rg.Settings(), None)
    editor.left.set_xlim(1000, 1200)
    editor.left.set_ylim(1100, 1000)
    editor.update()
    correction = rg.find_correction(large, places)
    background = correction.model.evaluate(0, *large.shape[:2])
    whole = large - (background - correction.sky)
    # Shown like the whole result, which is read in larger pixels: medians of these differ a little.
    expected = rg.stretch_midtones(whole[1000:1101, 1000:1201], whole[2::5, 2::5])
    shown = editor.right.images[0]
    assert shown.get_extent() == [999.5, 1200.5, 1100.5, 999.5]
    assert_allclose(shown.get_array(), 255 * expected, atol=2)
    before = shown.get_array().copy()
    editor.left.set_xlim(-900, -700)  # out of the picture: what was visible last stays
    editor.update()
    assert_array_equal(shown.get_array(), before)
    plt.close('all')




def test_rings_show_what_is_measured(hand):
    hand.set(PLACES)
    hand.click(200, 300, key='shift')
    rings, = (each for each in hand.editor.left.collections if isinstance(each, EllipseCollection))
    assert len(rings.get_offsets()) == len(PLACES)


@pytest.mark.skipif(not (shutil.which('Xvfb') and shutil.which('xdotool')), reason='needs Xvfb and xdotool')
def test_real_window(cli, sky):
    pytest.importorskip('tkinter')
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    (cli.folder / 'start').write_text('\n'.join(f'{x} {y}' for x, y in PLACES))
    screen = subprocess.Popen(['Xvfb', '-displayfd', '1', '-screen', '0', '1600x900x24'], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
    try:
        environment = {**os.environ, 'DISPLAY': f':{screen.stdout.readline().strip()}'}
        environment.pop('MPLBACKEND', None)
        command = '-q -i sky.tif -o out.tif -f start --save-points points --edit'.split()
        process = subprocess.Popen([sys.executable, ROOT / 'rmgradient.py', *command], env=environment,
                                   stderr=subprocess.PIPE, text=True)

        def xdotool(*arguments):
            done = subprocess.run(['xdotool', *map(str, arguments)], env=environment, capture_output=True, text=True)
            return done.stdout.split()

        for _ in range(100):
            if window := xdotool('search', '--onlyvisible', '--name', 'rmgradient'):
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
        time.sleep(1.5)
        xdotool('mousemove', '--window', window[0], 450, 250, 'click', 1)
        time.sleep(0.7)
        xdotool('key', 's')
        for _ in range(50):
            time.sleep(0.1)
            if (cli.folder / 'points').exists():
                break
        xdotool('key', 'Return')
        _, message = process.communicate(timeout=60)
        assert process.returncode == 0
        assert all('the points hardly agree' in line for line in message.splitlines()), message
        pairs = rg.parse_points_file((cli.folder / 'points').read_text().splitlines())[0]
        assert_array_equal(pairs[:7], PLACES)
        assert len(pairs) == 8
        assert cli('-o', 'again.tif', points=['-f', 'points']) == 0
        assert (cli.folder / 'again.tif').read_bytes() == (cli.folder / 'out.tif').read_bytes()
    finally:
        screen.kill()
        screen.wait()
        screen.stdout.close()


class Browser:
    """What a page of WebAgg says to the program: a process, and a socket to its first figure."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen([sys.executable, ROOT / 'rmgradient.py', '-i', 'sky.tif', '--edit', *arguments],
                                        env={**os.environ, 'MPLBACKEND': 'WebAgg'}, stderr=subprocess.PIPE, text=True)
        self.said = ''
        while not (found := re.search(r'open http://([\d.:]+) in a browser', self.said)):
            assert self.process.poll() is None, self.said
            self.said += self.process.stderr.readline()
        self.address = found[1]

    def say(self, *messages):
        """Send messages as a page does, and read until the program closes."""
        import tornado.ioloop
        import tornado.websocket

        async def talk():
            page = await tornado.websocket.websocket_connect(f'ws://{self.address}/1/ws')
            for message in messages:
                await page.write_message(json.dumps({'figure_id': '1', 'guiEvent': {}, **message}))
            while await page.read_message() is not None:
                pass
            page.close()

        tornado.ioloop.IOLoop.current().run_sync(talk, timeout=30)

    def status(self):
        self.said += self.process.communicate(timeout=30)[1]
        return self.process.returncode


def test_page_in_a_browser(cli, sky):
    """Enter writes, Escape does not, and both end the program; Ctrl-C does, too. A real browser was tried by hand."""
    pytest.importorskip('tornado')
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    (cli.folder / 'start').write_text('\n'.join(f'{x} {y}' for x, y in PLACES))
    key = {'type': 'key_press', 'x': 300, 'y': 200}
    browser = Browser('-o', 'out.tif', '-f', 'start')
    browser.say({'type': 'button_press', 'x': 300, 'y': 300, 'button': 0, 'buttons': 1, 'modifiers': []},
                {'type': 'button_release', 'x': 300, 'y': 300, 'button': 0, 'buttons': 0, 'modifiers': []},
                {**key, 'key': 'ks'}, {**key, 'key': 'kEnter'})
    assert browser.status() == 0, browser.said
    assert (cli.folder / 'out.tif').exists()
    pairs = rg.parse_points_file((cli.folder / 'sky_points.txt').read_text().splitlines())[0]
    assert len(pairs) == len(PLACES) + 1
    browser = Browser('-o', 'other.tif', '-f', 'start')
    browser.say({**key, 'key': 'kEscape'})
    assert browser.status() == 0
    assert 'closed; nothing written' in browser.said
    browser = Browser('-o', 'other.tif', '-f', 'start')
    browser.process.send_signal(signal.SIGINT)
    assert browser.status() == 130
    assert not (cli.folder / 'other.tif').exists()


@pytest.mark.parametrize('name', ['M42 $x^$.tif', 'a$b$.tif', '\u661f\u7a7a.tif'])
def test_names_are_no_formulas(cli, name):
    """Nor is a font without their letters a reason to warn."""
    matplotlib.use('Agg')
    (cli.folder / 'sky.tif').rename(name)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with rg.open_picture(name) as picture, rg.default_style():
            editor = rg.Editor(picture, cli.points, rg.Settings(), save=None)
            editor.figure.canvas.draw()
            assert editor.left.get_title().startswith(name)
