# SPDX-License-Identifier: Apache-2.0
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys

import make_sky
import numpy as np
import pytest
import tifffile
from helpers import ROOT, draw, posix, scatter, words
from numpy.testing import assert_array_equal

import rmgradient as rg


def expected(sky, points, smooth='auto', sigma=8.0, n_channels=3):
    """Return corrected picture and background in float64, on whole frames."""
    height, width = sky.shape[:2]
    points = rg.make_points(points)
    measured = rg.measure_levels(sky[..., :n_channels], points, sigma, robust=smooth == 'auto')
    background = rg.fit_background(measured, smooth).model.evaluate(0, height, width)
    level = np.median(measured.levels, axis=0).mean() if smooth == 'auto' else background.min(axis=(0, 1))
    return sky[..., :n_channels] - (background - level), background


# ---- the job --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['u1', 'u2', 'u4', 'i2', 'f4', 'f8'])
@pytest.mark.parametrize('n_samples', [1, 2, 3, 4])
def test_every_type(cli, dtype, n_samples):
    sky, _ = draw(n_channels=n_samples, dtype=np.dtype(dtype))
    n_channels = 3 if n_samples > 2 else 1
    tifffile.imwrite('sky.tif', sky if n_samples > 1 else sky[..., 0],
                     photometric='rgb' if n_channels == 3 else 'minisblack',
                     planarconfig='contig' if n_samples > 1 else None, extrasamples=[0] * (n_samples - n_channels))
    assert cli('-b', 'bg.tif', '-r', 37) == 0
    out, background = tifffile.imread('out.tif'), tifffile.imread('bg.tif')
    assert out.dtype == sky.dtype == background.dtype
    out, background = (a.reshape(*sky.shape[:2], -1) for a in (out, background))
    assert out.shape == sky.shape
    assert background.shape == (*sky.shape[:2], n_channels)
    assert_array_equal(out[..., n_channels:], sky[..., n_channels:])
    corrected, model = expected(sky, cli.points, n_channels=n_channels)
    # Integers: rounded once. Floats: rounded to their own precision.
    if out.dtype.kind == 'f':
        tolerance = max(2 * np.finfo(out.dtype).eps, 1e-12)  # strips are evaluated to about 1e-14
    else:
        tolerance = 0.5 + 1e-6
        corrected = np.clip(corrected, np.iinfo(out.dtype).min, np.iinfo(out.dtype).max)
    assert np.abs(out[..., :n_channels] - corrected).max() <= tolerance
    assert np.abs(background - model).max() <= tolerance
    assert cli.files() == ['bg.tif', 'out.tif', 'sky.tif']


def test_output_is_input_minus_background_plus_sky(cli):
    tifffile.imwrite('sky.tif', cli.sky.astype(np.float64), photometric='rgb')
    medians = np.median(rg.measure_levels(cli.sky, rg.make_points(cli.points)).levels, axis=0)
    for options, smooth, level in [([], 'auto', medians.mean()), (['--sky', 'color'], 'auto', medians),
                                   (['--sky', 'darkest'], 'auto', None), ([], 0.1, None), (['--sky', '70'], 'auto', 70),
                                   (['--sky', '-150'], 0.1, -150)]:
        assert cli('-b', 'bg.tif', '-m', smooth, *options, '--overwrite') == 0
        sky, out, background = (tifffile.imread(f'{name}.tif') for name in ('sky', 'out', 'bg'))
        level = background.min(axis=(0, 1)) if level is None else level
        np.testing.assert_allclose(out, sky - background + level, rtol=0, atol=1e-9)


@pytest.mark.parametrize('rows', [1, 13, 100, 1000])
def test_rows_change_no_pixel(cli, rows):
    assert cli('-r', rows) == 0
    corrected, _ = expected(cli.sky, cli.points)
    assert np.abs(tifffile.imread('out.tif') - corrected).max() <= 0.5 + 1e-6


def test_smooth_and_sigma_are_used(cli):
    assert cli('-m', 0.1, '-s', 3, '--overwrite') == 0
    corrected, _ = expected(cli.sky, cli.points, 0.1, 3.0)
    assert np.abs(tifffile.imread('out.tif') - np.clip(corrected, 0, None)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize('level', [1, 6, 9])
def test_compression_changes_no_pixel(cli, level):
    assert cli() == 0
    plain = tifffile.imread('out.tif')
    assert cli('-c', level, '-b', 'bg.tif', '--overwrite') == 0
    assert_array_equal(tifffile.imread('out.tif'), plain)
    with tifffile.TiffFile('out.tif') as tif:
        assert tif.pages[0].compression == 8
        assert tif.pages[0].predictor == 2


def test_profile_comes_along(cli):
    profile = make_sky.srgb_profile()
    tifffile.imwrite('sky.tif', cli.sky, photometric='rgb', iccprofile=profile)
    assert cli('-b', 'bg.tif') == 0
    for name in ('out.tif', 'bg.tif'):
        with tifffile.TiffFile(name) as tif:
            assert tif.pages[0].tags[34675].value == profile


def test_same_command_same_bytes(cli, monkeypatch):
    results = set()
    for workers in (1, 2, 5):
        monkeypatch.setattr(rg, 'N_WORKERS', workers)
        assert cli('-c', 1, '-r', 7, '--overwrite') == 0
        results.add((cli.folder / 'out.tif').read_bytes())
    assert len(results) == 1


# ---- points ---------------------------------------------------------------------------------------------------------

def test_points_from_option_file_and_standard_input_are_the_same(cli, monkeypatch):
    text = '# sky\n30 30 a comment\n60 40\n-0 -5\n90 60\n40 60\n'
    (cli.folder / 'points').write_text('\ufeff' + text, encoding='utf-8')  # as Windows' editors begin a file
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(text.encode())))
    outputs = []
    for points in (['-f', 'points'], ['-f', '-'], ['-p', *'30 30 60 40 -0 -5 90 60 40 60'.split()]):
        assert cli('--overwrite', points=points) == 0
        outputs.append(tifffile.imread('out.tif'))
    assert_array_equal(outputs[0], outputs[1])
    assert_array_equal(outputs[0], outputs[2])
    corrected, _ = expected(cli.sky, [(30, 30), (60, 40), (-0.0, -5), (90, 60), (40, 60)])
    assert np.abs(outputs[0] - corrected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(('points', 'status', 'match'), [
    ('30 30 40 40 50', 2, 'the number of coordinates is odd'),
    ('30 30 40 forty 50 50', 2, "'forty' is not a number of pixels"),
    ('-30 30 40 40 50 50', 1, 'first point has a minus sign'),
    ('30 30 23 40 50 50', 1, 'sky.tif: point (23, 40) is within 24 pixels of the border; use a smaller sigma'),
    ('30 30 40 400 50 50', 1, 'sky.tif: point (40, 400) is outside of the picture, 120 x 90 pixels'),
    ('30 30 -0 -90 50 50', 1, 'outside'),
    ('30 30 40 40 30 30', 1, 'point (30, 30), number 3, repeats number 1'),
    ('30 30 40 40', 1, 'too few points, 2; give at least three'),
])
def test_bad_points(cli, points, status, match):
    cli.fails(status=status, match=match, points=['-p', *points.split()])


@pytest.mark.parametrize(('text', 'match'), [
    ('30 30\n40\n', 'points: line 2: the number of coordinates is odd'),
    ('30 30\n40 x\n', "points: line 2: coordinate 'x'"),
    ('', 'points: no points'),
    ('30 30\n30 30\n40 40\n', 'points: point (30, 30) in points, line 2, number 2, repeats number 1'),
])
def test_bad_points_file(cli, text, match):
    (cli.folder / 'points').write_text(text)
    cli.fails(match=match, points=['-f', 'points'])


def test_missing_points_file(cli):
    cli.fails(match='nowhere: No such file', points=['-f', 'nowhere'])


def test_warning_names_a_point_on_a_star(cli):
    y, x = np.mgrid[0:300, 0:400]
    sky = (1000 + x + np.random.default_rng(1).normal(0, 10, x.shape)
           + 30000 * np.exp(-((x - 200) ** 2 + (y - 150) ** 2) / 18)).astype(np.uint16)
    tifffile.imwrite('sky.tif', sky)
    good = [p for p in scatter(300, 400, 40).tolist() if np.hypot(p[0] - 200, p[1] - 150) > 40]
    assert cli('-q', '--overwrite', points=['-p', *words(good)]) == 0
    assert cli.stderr == ''
    assert cli('-q', '--overwrite', points=['-p', *words([*good, (201, 150)])]) == 0
    assert re.fullmatch(r'rmgradient: warning: sky.tif: point \(201, 150\) is [\d.e+]+ brighter than what its '
                        r'neighbors suggest: is it on a star or nebula\?\n', cli.stderr)


# ---- wrong usage ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments', [
    ['-s', '0'], ['-s', '-1'], ['-s', 'nan'], ['-s', 'wide'], ['-r', '0'], ['-r', '1.5'], ['-c', '10'], ['-c', '-1'],
    ['-m', '-0.1'], ['-m', 'inf'], ['-m', 'automatic'],
])
def test_options_out_of_range(cli, arguments):
    cli.fails(*arguments, status=2, match=f'{arguments[1]!r} is not a')


def test_options_that_are_missing_or_too_many(cli):
    cli.fails(status=2, match='one of the arguments', points=['-q'])
    cli.fails('-f', 'points', status=2, match='not allowed with')
    cli.fails('--nonsense', status=2, match='unrecognized arguments: --nonsense')


def test_help_and_version(capsys):
    for option, text in [('-h', 'isoline'), ('--version', rg.__version__)]:
        with pytest.raises(SystemExit) as stop:
            rg.main([option])
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


def test_page_of_options_has_all_and_their_defaults():
    readme = (ROOT / 'docs' / 'options.rst').read_text(encoding='utf-8')
    table = dict(re.findall(r'^((?:-\w, )?--[\w-]+)[^\n]*?(?:  (\S+))?$', readme, re.MULTILINE))
    for action in rg.build_parser()._actions:
        if action.dest in ('help', 'version'):
            continue
        name = ', '.join(action.option_strings)
        assert name in table
        default = {'auto': rg.AUTO, 'method': None, 'dither': None}.get(action.dest, action.default)
        if isinstance(default, int | float | str) and not isinstance(default, bool):
            assert table[name] == f'{default:g}' if isinstance(default, float) else str(default)


def test_remarks_and_quiet(cli):
    assert cli() == 0
    lines = cli.stderr.splitlines()
    assert re.fullmatch(r'rmgradient: sky.tif: fit: fair \(expected error \d+ counts, 0.\d+ of the noise of a pixel; '
                        r'the points agree to [\d.]+\), because the points are few', lines[0])
    assert lines[1].startswith('rmgradient: out.tif: written; sky level ')
    assert cli('-v', '--overwrite') == 0
    lines = cli.stderr.splitlines()
    assert re.fullmatch(r'rmgradient: sky.tif: model: (mean|plane) and a multiquadric of shape \d+ pixels and '
                        r'smoothness [\d.e-]+', lines[1])
    assert re.fullmatch(r'rmgradient: sky.tif: leave-one-out errors of the points: \S+, \S+, \S+ \(RMS\); standard '
                        r'errors of their levels: \S+, \S+, \S+', lines[2])
    assert cli('-q', '--overwrite') == 0
    assert cli.stderr == ''


def test_logging_is_left_as_it_was(cli):
    logger = logging.getLogger('rmgradient')
    before = logger.level, list(logger.handlers), logging.getLogger('tifffile').level
    cli()
    assert before == (logger.level, list(logger.handlers), logging.getLogger('tifffile').level)


def test_pixels_that_become_black_are_counted_and_explained(cli):
    sky = cli.sky.copy()
    sky[80:, :20] = 5  # where the glow is weaker than the sky: lifted
    sky[:10, -20:-6] = 5  # where it is strong: black
    sky[:10, -5:] = 0  # no data
    sky[3:7, -10:-7] = 0  # black before
    sky[30:33, -10:-7] = 65535  # white before
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    assert cli('-q', '-s', 4) == 0
    corrected, _ = expected(sky, cli.points, sigma=4.0)
    percent = 100 * ((corrected < -0.5) & (sky > 0)).any(axis=2).mean()
    assert 0.5 < percent < 3
    assert cli.stderr.endswith(f'rmgradient: warning: sky.tif: {rg.rounded(percent)} % of the pixels became black: '
                               'raise the sky, for example --sky 4500\n')
    assert cli('-q', '-s', 4, '--sky', '65500', '--overwrite') == 0
    assert re.search(r'warning: sky.tif: \d\d % of the pixels became white: lower the sky, for example --sky',
                     cli.stderr)
    tifffile.imwrite('sky.tif', cli.sky, photometric='rgb')
    assert cli('-q', '--overwrite') == 0
    assert cli.stderr == ''
    cli.sky[40, 60] = 1  # one pixel is no news
    tifffile.imwrite('sky.tif', cli.sky, photometric='rgb')
    assert cli('-s', 2, '--overwrite') == 0
    assert 'warning' not in cli.stderr


def test_sky_that_is_no_level(cli):
    for word in ('grey', 'nan', 'inf', ''):
        cli.fails('--sky', word, status=2, match='is neither a number nor one of gray, color, darkest')
    cli.fails('--sky', '0', '--divide', match='sky.tif: to divide, the sky needs a level above 0, not 0, 0, 0')
    for number in ('-5', '65536'):
        cli.fails('--sky', number, match=f'sky.tif: a sky level of {number} is not in the range of the picture, '
                                                 '0 to 65535')


# ---- files ----------------------------------------------------------------------------------------------------------

def test_input_that_is_no_picture(cli):
    for name, content, match in [('missing.tif', None, 'missing.tif: No such file'),
                                 ('text.tif', b'hello', 'is not a TIFF or FITS picture'),
                                 ('empty.tif', b'', 'is empty'),
                                 ('header.tif', b'II*\0', 'damaged')]:
        if content is not None:
            (cli.folder / name).write_bytes(content)
        cli.fails('-i', name, match=match)
    cli.fails('-i', '.', match='.: is a folder; name the pictures in it')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_input_without_permission(cli):
    (cli.folder / 'sky.tif').chmod(0)
    cli.fails(match='sky.tif: Permission denied')


def test_truncated_input(cli):
    data = (cli.folder / 'sky.tif').read_bytes()
    for size in (9, len(data) // 2, len(data) - 1):
        (cli.folder / 'sky.tif').write_bytes(data[:size])
        cli.fails(match='sky.tif: ')


def test_output_that_exists(cli):
    (cli.folder / 'out.tif').write_text('precious')
    cli.fails(match='out.tif: already exists; choose another name or use --overwrite')
    cli.fails('-b', 'sky.tif', match='out.tif: already exists')
    assert cli('--overwrite') == 0
    assert tifffile.imread('out.tif').shape == cli.sky.shape


def test_output_in_the_wrong_place(cli):
    cli.fails('-o', 'nowhere/out.tif', match='nowhere/out.tif: there is no folder')
    (cli.folder / 'folder').mkdir()
    (cli.folder / 'folder' / 'sky.tif').mkdir()
    cli.fails('-o', 'folder', match='folder/sky.tif: is a folder')
    cli.fails('-b', 'nowhere/bg.tif', match='nowhere/bg.tif: there is no folder')
    for option in ('-o', '-b', '--save-points'):  # it would be a file of that name
        cli.fails(option, 'nowhere/', match='nowhere/: there is no such folder')


@posix
def test_outputs_are_told_from_inputs_and_each_other(cli):
    os.symlink('sky.tif', 'link.tif')
    os.link('sky.tif', 'hard.tif')
    (cli.folder / 'points').write_text('30 30\n40 40\n50 50\n')
    for name in ('sky.tif', './sky.tif', 'link.tif', 'hard.tif'):
        cli.fails('-o', name, '--overwrite', match='is the input sky.tif')
        cli.fails('-b', name, '--overwrite', match='is the input sky.tif')
    cli.fails('-o', 'points', '--overwrite', match='is the input points', points=['-f', 'points'])
    cli.fails('-b', 'out.tif', match='out.tif: is named for two outputs')
    cli.fails('-b', './out.tif', match='is the same file as out.tif')
    os.symlink('out.tif', 'other.tif')
    cli.fails('-b', 'other.tif', match='is the same file as out.tif')


def test_not_a_number_in_a_window(cli):
    sky = cli.sky.astype(np.float32)
    x, y = cli.points[3]
    sky[y, x, 1] = np.nan
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    assert cli('-q') == 0  # one pixel costs nothing
    sky[:, x - 9:] = np.inf
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    assert re.search(r'sky.tif: point \(\d+, \d+\) has', cli.fails('--overwrite', match=' % of the averaged area'))


def test_not_a_number_elsewhere_stays(cli):
    sky = cli.sky.astype(np.float32)
    sky[0, 0] = np.nan, np.inf, -np.inf
    tifffile.imwrite('sky.tif', sky, photometric='rgb')
    assert cli('-s', 2) == 0
    assert_array_equal(tifffile.imread('out.tif')[0, 0], sky[0, 0])


def test_out_of_memory(cli, monkeypatch):
    def give_up(*_):
        raise MemoryError
    monkeypatch.setattr(rg.TiffImage, 'read', give_up)
    cli.fails(match='sky.tif: not enough memory, or no more threads allowed; a smaller --rows may help')


# ---- for real -------------------------------------------------------------------------------------------------------

@posix
def test_script_through_xargs(tmp_path):
    command = f'xargs {sys.executable} {ROOT}/rmgradient.py -i {ROOT}/test_data/sky.tif -o out.tif -b bg.tif -q -p'
    with open(ROOT / 'test_data' / 'skypoints') as points:
        done = subprocess.run(command.split(), stdin=points, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    truth = make_sky.true_background()
    background = tifffile.imread(tmp_path / 'bg.tif').astype(float)
    assert np.all((background - truth).std(axis=(0, 1)) < 12)  # of 2000 to 4000 counts of glow
    with tifffile.TiffFile(tmp_path / 'out.tif') as tif:
        assert tif.pages[0].tags[34675].value == make_sky.srgb_profile()


@posix
@pytest.mark.parametrize('tool', ['-i *', 'xargs', 'parallel', 'for'])
def test_commands_for_many_pictures(cli, tool):
    """Names may have apostrophes and newlines."""
    if tool in ('xargs', 'parallel') and not shutil.which(tool):
        pytest.skip(f'needs {tool}')
    names = ['0.tif', "it's\na star.tif"]
    for name in names:
        tifffile.imwrite(name, cli.sky, photometric='rgb')
    (cli.folder / 'sky.tif').unlink()
    (cli.folder / 'points').write_text('\n'.join(f'{x} {y}' for x, y in cli.points))
    (cli.folder / '4.tif').write_text('no picture')
    (cli.folder / 'rmgradient').write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/rmgradient.py "$@"\n')
    (cli.folder / 'rmgradient').chmod(0o755)
    page = (ROOT / 'docs' / 'many.rst').read_text(encoding='utf-8').split('\nSeveral machines')[0]
    commands = re.findall('^    (.+)', page, re.MULTILINE)
    assert len(commands) == 6
    command, = (command for command in commands if tool in command)
    done = subprocess.run(f'{commands[0]} && {command}', shell=True, capture_output=True, text=True,
                          env={**os.environ, 'PATH': f'{cli.folder}{os.pathsep}{os.environ["PATH"]}'})
    assert (done.returncode == 0) == (tool == 'for')  # one of them failed
    assert re.search(r'rmgradient: error: (\./)?4.tif: is not a TIFF or FITS picture\n', done.stderr)
    assert (tool != '-i *') == ('1 of 3 pictures failed; the others are done' not in done.stderr)
    assert sorted(os.listdir('corrected')) == names
    outputs = [(cli.folder / 'corrected' / name).read_bytes() for name in names]
    assert len(set(outputs)) == 1


def test_points_files_that_look_wrong(cli):
    (cli.folder / 'flat').write_text('30 30 90 30\n40 60 90 60\n60 40 30 60\n')
    assert cli(points=['-f', 'flat']) == 0
    assert 'warning: flat: some lines have more than a pair of numbers; only the first two are used' in cli.stderr
    (cli.folder / 'pairs').write_text('30 30 1234\n90 60 a star 3 4\n60 40 # 3 4 5 6\n')
    assert cli('--overwrite', points=['-f', 'pairs']) == 0
    assert 'some lines' not in cli.stderr
    (cli.folder / 'other').write_text('# m31.tif, 600 x 400 pixels, sigma 8\n30 30\n90 60\n60 40\n')
    assert cli('--overwrite', points=['-f', 'other']) == 0
    assert 'sky.tif: the points were saved for a picture of 600 x 400 pixels, and this one has 120 x 90' in cli.stderr


def test_points_with_numbers_or_of_another_sigma(cli):
    numbered = ''.join(f'{i} {x} {y}\n' for i, (x, y) in enumerate(cli.points, 30))
    (cli.folder / 'numbered').write_text(numbered)
    cli(points=['-f', 'numbered'])
    assert 'warning: numbered: some lines have more than a pair of numbers; only the first two are used: are the ' \
        'first ones the numbers of the points?' in cli.stderr
    assert cli('--overwrite', '--save-points', 'saved', '-s', '4.5') == 0
    assert cli('--overwrite', '-s', '4.5', points=['-f', 'saved']) == 0
    assert 'saved with' not in cli.stderr
    assert cli('--overwrite', points=['-f', 'saved']) == 0
    assert 'warning: saved: the points were saved with --sigma 4.5, and are used with 8' in cli.stderr


def hilly(cli, places):
    """Write a sky with a nebula at (300, 200), run with the places as points, and return the warnings."""
    y, x = np.mgrid[0:400, 0:600]
    light = 3000 * np.exp(-((x - 300) ** 2 + (y - 200) ** 2) / (2 * 50.0**2))
    sky = 3000 + 0.5 * x + light + np.random.default_rng(1).normal(0, 100, x.shape)
    tifffile.imwrite('sky.tif', np.rint(sky).astype(np.uint16))
    assert cli('-q', '--overwrite', points=['-p', *words(places)]) == 0
    return cli.stderr


def test_points_that_hardly_agree(cli):
    """One bad point among a few is not told from the others, but all are doubtful; among many it is named."""
    good = [(x, y) for x in range(40, 600, 75) for y in range(40, 400, 80) if np.hypot(x - 300, y - 200) > 170]
    message = 'the points hardly agree on a smooth background: look at --preview'
    assert hilly(cli, good) == ''
    assert hilly(cli, [(40, 40), (560, 40), (40, 360), (560, 360), (300, 40)]) == ''
    assert message in hilly(cli, [(40, 40), (560, 40), (40, 360), (560, 360), (300, 200)])
    for bad in ([(290, 200)], [(290, 200), (310, 205)]):
        named = hilly(cli, [*good, *bad])
        assert len(re.findall('brighter than what its neighbors suggest', named)) == len(bad)
        assert all(f'point {place} is' in named for place in bad)
        assert message not in named


def test_background_below_zero(cli):
    sky = np.clip(1000 - 20.0 * np.arange(120), 100, None)[None] + np.random.default_rng(1).normal(0, 10, (90, 120))
    tifffile.imwrite('sky.tif', np.rint(sky).astype(np.uint16))
    assert cli('-q', points=['-p', *words([(24, 24), (40, 60), (25, 40), (35, 24)])]) == 0
    assert re.search(r'warning: sky.tif: the background falls to -\d\S+, below 0, near \(9\d, \d+\): '
                     'add a point of empty sky there', cli.stderr)


def test_background_below_zero_beside_a_point(cli):
    """A point closer to the border than any that can be measured is no advice."""
    sky = np.clip(1000 - 9.0 * np.arange(120), 0, None)[None] + np.random.default_rng(1).normal(0, 3, (90, 120))
    tifffile.imwrite('sky.tif', np.rint(np.clip(sky, 0, None)).astype(np.uint16))
    assert cli('-q', points=['-p', *words([(24, 24), (30, 60), (60, 30), (60, 60), (94, 24), (94, 64)])]) == 0
    assert re.search(r'below 0, near \(9\d, \d+\): crop there, or check darks and flats', cli.stderr)


def test_dither_is_for_integers(cli):
    assert cli('--dither') == 0
    assert 'changes nothing' not in cli.stderr
    tifffile.imwrite('sky.tif', draw(dtype=np.float32)[0], photometric='rgb')
    assert cli('--dither', '--overwrite') == 0
    assert 'warning: sky.tif: floating point numbers are not rounded: leave --dither out' in cli.stderr


def test_blur_that_is_too_wide(cli):
    cli.fails('-s', '15', match='sky.tif: the blur reaches 45 pixels, too far in 120 x 90 pixels; use a smaller sigma')


def test_points_over_a_small_part_of_the_picture(cli):
    for smooth in ('auto', '0.1'):
        for places, warns in (([(30, 30), (33, 31), (31, 34)], True), ([(30, 30), (90, 30), (30, 60)], False)):
            assert cli('-q', '--overwrite', '-m', smooth, points=['-p', *words(places)]) == 0
            assert ('of the picture, and outside them the background is a guess' in cli.stderr) == warns


def test_picture_and_background_are_dithered_by_different_noise(cli):
    assert cli('--dither', '-b', 'bg.tif') == 0
    found = rg.find_correction(cli.sky, cli.points)
    background = found.model.evaluate(0, 90, 120)
    # What rounding after the noise adds to the exact values.
    added = [tifffile.imread('out.tif') - (cli.sky - (background - found.sky)), tifffile.imread('bg.tif') - background]
    assert all(0.9 < np.ptp(each) < 2 for each in added)
    assert abs(np.corrcoef(*(each.ravel() for each in added))[0, 1]) < 4 / np.sqrt(background.size)


def test_dithered_output_is_the_same_at_every_run(cli, monkeypatch):
    results = set()
    for workers, rows in [(1, 100), (3, 7), (2, 1)]:
        monkeypatch.setattr(rg, 'N_WORKERS', workers)
        assert cli('--dither', '-b', 'bg.tif', '-r', rows, '--overwrite') == 0
        results.add((tifffile.imread('out.tif').tobytes(), tifffile.imread('bg.tif').tobytes()))
    assert len(results) == 1


@posix
def test_demonstration_from_anywhere_and_again(tmp_path):
    for _ in range(2):
        subprocess.run([ROOT / 'test_sky_image.sh', sys.executable], cwd=tmp_path, check=True, capture_output=True)
    assert tifffile.imread(ROOT / 'sky_out.tif').shape == (400, 600, 3)
    assert list(tmp_path.iterdir()) == []


def test_drawn_sky_is_what_the_script_draws(tmp_path):
    subprocess.run([sys.executable, ROOT / 'test_data' / 'make_sky.py', tmp_path], check=True)
    drawn = tifffile.imread(tmp_path / 'sky.tif').astype(int)
    # Another processor may round an exponential otherwise, and so a pixel.
    assert np.abs(drawn - tifffile.imread(ROOT / 'test_data' / 'sky.tif')).max() <= 1
    assert (tmp_path / 'skypoints').read_text() == (ROOT / 'test_data' / 'skypoints').read_text()
    assert (ROOT / 'test_data' / 'sky.tif').stat().st_size < 1.5e6
    assert '-' in (tmp_path / 'skypoints').read_text()


def test_system_that_is_not_posix(cli):
    """What Windows lacks is not needed."""
    tifffile.imwrite('deflate.tif', cli.sky, photometric='rgb', compression='zlib', rowsperstrip=16)
    (cli.folder / 'damaged.tif').write_bytes((cli.folder / 'sky.tif').read_bytes()[:-100])
    code = ('import os, signal, sys; import numpy, scipy.interpolate, tifffile\n'
            'for module, name in [(os, "pread"), (os, "sched_getaffinity"), (os, "O_DIRECTORY"), (os, "O_TMPFILE"), '
            '(os, "chown"), (signal, "SIGHUP")]:\n'
            '    if hasattr(module, name): delattr(module, name)\n'
            'import rmgradient; sys.exit(rmgradient.main(sys.argv[1:]))')
    (cli.folder / 'out').mkdir()
    names = ['sky.tif', 'deflate.tif', 'damaged.tif']
    done = subprocess.run([sys.executable, '-c', code, '-q', '-i', *names, '-o', 'out', '-p', *words(cli.points)],
                          capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 1
    assert 'damaged.tif: damaged: segment 0 of 1 ends at byte' in done.stderr
    assert '1 of 3 pictures failed; the others are done' in done.stderr
    assert cli() == 0
    for name in names[:2]:
        assert_array_equal(tifffile.imread(f'out/{name}'), tifffile.imread('out.tif'))


@posix
@pytest.mark.parametrize(('closed', 'text', 'status', 'message'), [
    (2, b'', 0, b''),
    (0, b'', 1, b'rmgradient: error: standard input: no points; give at least three\n'),
    (None, b'\xff\xfe 7', 1, 'rmgradient: error: standard input: line 1: coordinate \'\ufffd\ufffd\' is not a number '
                            'of pixels\n'.encode())])
def test_standard_streams_that_are_closed_or_no_text(cli, closed, text, status, message):
    points = ['-f', '-'] if status else ['-p', *words(cli.points)]
    done = subprocess.run([sys.executable, ROOT / 'rmgradient.py', '-i', 'sky.tif', '-o', 'out.tif', *points],
                          input=text, capture_output=True, preexec_fn=lambda: closed is None or os.close(closed),
                          env={**os.environ, 'PYTHONIOENCODING': 'utf-8:strict'})
    assert (done.returncode, done.stderr) == (status, message)
    assert cli.files() == ['out.tif', 'sky.tif'][bool(status):]


@posix
def test_commands_of_the_manual_page(tmp_path, monkeypatch):
    shutil.copy(ROOT / 'rmgradient.py', tmp_path)
    shutil.copytree(ROOT / 'test_data', tmp_path / 'test_data')
    commands = re.sub(r'^    ', '', rg.__doc__[rg.__doc__.index('    python'):], flags=re.MULTILINE)
    subprocess.run(f'set -e\n{commands}', shell=True, cwd=tmp_path, check=True, capture_output=True,
                   env={**os.environ, 'PATH': f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'})
    for name in ('sky_auto.tif', 'sky_out.tif', 'sky_background.tif'):
        assert tifffile.imread(tmp_path / name).shape == (400, 600, 3)
    monkeypatch.setenv('COLUMNS', '80')
    help_text = rg.build_parser().format_help()
    assert rg.__doc__.strip().replace('python rmgradient.py', 'rmgradient') in help_text  # one story
    assert max(map(len, help_text.splitlines())) <= 80


def test_requirements_are_the_same_everywhere():
    header, setup, oldest = ((ROOT / name).read_text(encoding='utf-8')
                             for name in ('rmgradient.py', 'setup.py', 'tests/constraints-oldest.txt'))
    required = re.findall(r"'([^']+)'", re.search(r'install_requires=\[(.+?)\],', setup, re.DOTALL)[1])
    assert len(required) == 5
    assert re.findall('"([^"]+)"', re.search(r'# dependencies = \[(.+?)\]\n# ///', header, re.DOTALL)[1]) == required
    for requirement in required:
        assert '\n' + re.sub(r'\[.+\]', '', requirement).replace('>=', '==') in oldest
    python = re.search(r"python_requires='(.+)'", setup)[1]
    assert f'# requires-python = "{python}"' in header


def test_missing_library_is_one_line(tmp_path):
    (tmp_path / 'imagecodecs.py').write_text('raise ModuleNotFoundError("no", name="imagecodecs")\n')
    done = subprocess.run([sys.executable, ROOT / 'rmgradient.py', '-h'], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 1
    assert re.fullmatch('rmgradient: error: imagecodecs is missing; run: .*install '
                        'numpy scipy "tifffile.codecs." threadpoolctl tqdm\n', done.stderr)


@pytest.mark.parametrize(('prefix', 'executable', 'has_pip', 'expected'), [
    ('/home/me/.local/share/pipx/venvs/rmgradient', 'bin/python', False, 'pipx inject rmgradient astropy'),
    ('/home/me/.local/share/uv/tools/rmgradient', 'bin/python', False,
     'uv pip install --python /home/me/.local/share/uv/tools/rmgradient/bin/python astropy'),
    ('/home/me/.cache/uv/environments-v2/rmgradient-12ab', 'bin/python3', False,
     'uv run --with astropy rmgradient.py'),
    ('/home/me/my env', 'bin/python', True, "'/home/me/my env/bin/python' -m pip install astropy"),
    ('C:\\pipx\\venvs\\rmgradient', 'python.exe', False, 'pipx inject rmgradient astropy')])
def test_hints_fit_how_it_was_installed(monkeypatch, prefix, executable, has_pip, expected):
    monkeypatch.setattr(sys, 'prefix', prefix)
    monkeypatch.setattr(sys, 'executable', f'{prefix}/{executable}')
    monkeypatch.setattr(rg.importlib.util, 'find_spec', lambda name: has_pip or None)
    assert rg.how_to_install('astropy') == expected


@pytest.mark.parametrize('name', ['j.tif', 'J.TIF', "it's.tif"])
def test_advice_does_not_replace_the_picture(cli, name):
    """A JPEG that is called .tif: what it is converted to has another name, also if letters have no case."""
    (cli.folder / name).write_bytes(b'\xff\xd8\xff\xe0'.ljust(5000, b'\0'))
    line = cli.fails('-i', name, match='is a JPEG picture')
    command = shlex.split(line.partition('run: ')[2])
    assert command == ['convert', name, f'{name[:-4]}_converted.tif']


def test_hint_for_pipx_in_another_home(monkeypatch, tmp_path):
    """As with PIPX_HOME: the environment has a file of pipx."""
    (tmp_path / 'rmgradient').mkdir()
    (tmp_path / 'rmgradient' / 'pipx_metadata.json').touch()
    monkeypatch.setattr(sys, 'prefix', str(tmp_path / 'rmgradient'))
    assert rg.how_to_install('astropy') == 'pipx inject rmgradient astropy'


def test_hint_for_the_python_of_the_system(monkeypatch, tmp_path):
    """Into which pip refuses to write."""
    monkeypatch.setattr(sys, 'prefix', sys.base_prefix)
    monkeypatch.setattr(rg.os, '__file__', str(tmp_path / 'os.py'))
    assert rg.how_to_install('numpy').endswith(' -m pip install numpy')
    (tmp_path / 'EXTERNALLY-MANAGED').touch()
    assert rg.how_to_install('numpy') == 'python3 -m venv .venv && . .venv/bin/activate && pip install numpy'


def test_help_shows_commands_that_run(monkeypatch, capsys):
    for name, command in (('/usr/bin/rmgradient', 'rmgradient'), ('rmgradient.py', 'python rmgradient.py')):
        monkeypatch.setattr(sys, 'argv', [name])
        with pytest.raises(SystemExit):
            rg.main(['-h'])
        said = capsys.readouterr().out
        assert f'    {command} -i test_data/sky.tif' in said
        assert ('python' in said) == ('python' in command)


@pytest.mark.parametrize('arguments', [['-o', '-'], ['-i', '-'], ['--report', '-'], ['--mask', '-']])
def test_standard_output_is_no_file(cli, arguments):
    cli.fails(*arguments, status=2, match='pictures and outputs are files')


# ---- masks ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['u1', 'u2', 'f4', 'rgb', 'fits'])
def test_masks_of_any_type(cli, kind):
    mask = np.zeros((90, 120), bool)
    mask[:, 70:] = True
    name = 'mask.fits' if kind == 'fits' else 'mask.tif'
    if kind == 'fits':
        pytest.importorskip('astropy.io.fits').writeto(name, mask.astype(np.uint8))
    elif kind == 'rgb':
        colors = np.zeros((90, 120, 3), np.uint8)
        colors[mask, 1] = 9
        tifffile.imwrite(name, colors, photometric='rgb')
    else:
        tifffile.imwrite(name, (mask * np.dtype(kind).type(0.5 if kind == 'f4' else 200)).astype(kind))
    places = [(30, 26), (60, 60), (40, 40), (30, 60), (26, 50)]
    assert cli('--mask', name, '--preview', 'p.png', points=['-p', *words(places)]) == 0
    assert_array_equal(tifffile.imread('out.tif'), rg.remove_gradient(cli.sky, places, mask=mask))
    cli.fails('--mask', name, '-o', 'x.tif', points=['-p', *words([*places, (80, 40)])],
              match='sky.tif: point (80, 40) is in the mask; move it, or change the mask')


def test_masks_that_do_not_suit(cli):
    tifffile.imwrite('mask.tif', np.zeros((90, 100), np.uint8))
    cli.fails('--mask', 'mask.tif', match='mask.tif: has 100 x 90 pixels, but the picture has 120 x 90; a mask')
    cli.fails('--mask', 'nowhere.tif', match='nowhere.tif: No such file')
    cli.fails('--mask', '', status=2, match='the name of a file is empty')
    cli.fails('--mask', 'mask.tif', '-o', 'mask.tif', '--overwrite', match='mask.tif: is the input mask.tif')
    tifffile.imwrite('mask.tif', np.ones((90, 120), np.uint8))
    cli.fails('--mask', 'mask.tif', points=['-a', '-s', '2'], match='mask.tif has no pixel that is 0; sky must be 0')
    cli.fails('--white', '9', status=2, match='--white is for --stretch')
