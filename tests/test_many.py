# SPDX-License-Identifier: Apache-2.0
"""Several pictures in one run, and what a run loads."""
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from helpers import ROOT, draw, words
from numpy.testing import assert_array_equal

import rmgradient as rg


@pytest.fixture
def night(cli):
    """A folder of three skies, a folder for the results, and points."""
    for name in ('night', 'out', 'bg'):
        (cli.folder / name).mkdir()
    for i in range(3):
        tifffile.imwrite(f'night/{i}.tif', draw(seed=i)[0], photometric='rgb')
    (cli.folder / 'points').write_text('\n'.join(f'{x} {y}' for x, y in cli.points))
    return cli


PICTURES = ['-i', 'night/0.tif', 'night/1.tif', 'night/2.tif', '-o', 'out']


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_is_corrected_as_alone(night):
    for i in range(3):
        assert night('-i', f'night/{i}.tif', '-o', f'alone{i}.tif', '-b', f'back{i}.tif', points=['-f', 'points']) == 0
    assert night(*PICTURES, '-b', 'bg', '--save-points', 'out', '--preview', 'out', points=['-f', 'points']) == 0
    for i in range(3):
        for one, other in ((f'alone{i}.tif', f'out/{i}.tif'), (f'back{i}.tif', f'bg/{i}.tif')):
            assert (night.folder / one).read_bytes() == (night.folder / other).read_bytes()
        assert f'rmgradient: out/{i}.tif: written' in night.stderr
    assert listing(night.folder / 'out') == [f'{i}.{ending}' for i in range(3) for ending in ('png', 'tif', 'txt')]
    assert (night.folder / 'out/1.txt').read_text().startswith('# 1.tif, 120 x 90 pixels')


def test_points_from_standard_input_serve_all(night):
    with open('points') as points:
        done = subprocess.run([sys.executable, ROOT / 'rmgradient.py', '-q', *PICTURES, '-f', '-'],
                              stdin=points, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert listing(night.folder / 'out') == ['0.tif', '1.tif', '2.tif']


def test_points_are_chosen_for_each(night):
    for i in range(2):
        sky = np.random.default_rng(i).normal(1000, 20, (400, 500 + 40 * i)).astype(np.float32)
        tifffile.imwrite(f'night/{i}.tif', sky)
    assert night('-i', 'night/0.tif', 'night/1.tif', '-o', 'out', '--save-points', 'bg', points=['-a']) == 0
    points = [(night.folder / f'bg/{i}.txt').read_text() for i in range(2)]
    assert points[0] != points[1]
    assert night('-i', 'night/1.tif', '-o', 'one.tif', '--save-points', 'one', points=['-a']) == 0
    assert (night.folder / 'one').read_text() == points[1]


def test_a_failing_one_does_not_stop_the_rest(night):
    (night.folder / 'night/1.tif').write_text('no picture')
    assert night(*PICTURES, '-q', points=['-f', 'points']) == 1
    assert night.stderr.splitlines() == ['rmgradient: error: night/1.tif: is not a TIFF or FITS picture',
                                         'rmgradient: error: 1 of 3 pictures failed; the others are done']
    assert listing(night.folder / 'out') == ['0.tif', '2.tif']


@pytest.mark.parametrize('error', [MemoryError, OSError(5, 'Input/output error')])
def test_what_fails_in_one_picture_is_named_after_it(night, monkeypatch, error):
    read = rg.TiffImage.read

    def fail(image, *arguments):
        if fail.first is None or fail.first is image:
            fail.first = image
            raise error
        return read(image, *arguments)
    fail.first = None
    monkeypatch.setattr(rg.TiffImage, 'read', fail)
    assert night(*PICTURES, '-q', points=['-f', 'points']) == 1
    first, last = night.stderr.splitlines()
    assert first.startswith('rmgradient: error: night/0.tif: ')
    assert last == 'rmgradient: error: 1 of 3 pictures failed; the others are done'
    assert listing(night.folder / 'out') == ['1.tif', '2.tif']


@pytest.mark.parametrize(('arguments', 'match'), [
    (['-i', 'night/0.tif', 'sky.tif', './sky.tif'], 'sky.tif and ./sky.tif have the same name'),
    (['-i', 'night/0.tif', 'sky.tif', '-o', 'out.tif'], 'out.tif: is not a folder; for several pictures, name'),
    (['-i', 'night/0.tif', 'sky.tif', '-o', 'out', '-b', 'out'], 'out/0.tif: is named for two outputs'),
    (['-i', 'night/0.tif', 'night/1.tif', '-o', 'night', '--overwrite'], 'night/0.tif: is the input night/0.tif'),
    (['-i', 'night/0.tif', 'night/2.tif', '-o', 'old'], 'old/2.tif: already exists; choose another name'),
    (['-i', 'night/0.tif', 'night/2.tif', '-o', 'out', '--preview', 'p.png'], 'p.png: is not a folder')])
def test_refused_before_anything_is_read(night, monkeypatch, arguments, match):
    (night.folder / 'old').mkdir()
    (night.folder / 'old/2.tif').write_text('old')
    monkeypatch.setattr(rg, 'open_picture', None)  # opening a picture would be a traceback
    night.fails(*arguments, match=match)
    assert listing(night.folder / 'out') == []


def test_options_given_twice_add(night):
    """What is named is not dropped without a word."""
    assert night('-i', 'night/0.tif', '-i', 'night/2.tif', '-o', 'out', points=['-f', 'points']) == 0
    assert listing(night.folder / 'out') == ['0.tif', '2.tif']
    pairs = words(night.points)
    assert night('-i', 'night/0.tif', points=['-p', *pairs[:10], '-p', *pairs[10:]]) == 0
    assert (night.folder / 'out.tif').read_bytes() == (night.folder / 'out/0.tif').read_bytes()


def test_one_picture_into_a_folder(night):
    assert night('-o', 'out', points=['-f', 'points']) == 0
    assert night('-o', 'out.tif', points=['-f', 'points']) == 0
    assert_array_equal(tifffile.imread('out/sky.tif'), tifffile.imread('out.tif'))


@pytest.mark.parametrize(('options', 'more'), [([], set()), (['-m', '0.1'], {'scipy'})])
def test_only_what_a_run_uses_is_loaded(cli, options, more):
    command = ['rmgradient', '-q', '-i', 'sky.tif', '-o', 'out.tif', *options, '-p', *words(cli.points)]
    code = (f'import sys; sys.argv = {command}; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules); '
            'import rmgradient; rmgradient.main(); print(*set(sys.modules) - before)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'error: ' not in done.stderr
    loaded = {name.split('.')[0] for name in done.stdout.split()}
    others = {name for name in loaded - set(sys.stdlib_module_names)
              if not name.startswith(('_', 'scipy', 'cython_runtime'))}
    assert others == {'rmgradient', 'numpy', 'tifffile', 'imagecodecs'}
    assert ('scipy' in loaded) == bool(more)
    old = np.__version__.startswith('1.')  # loads more itself
    others = {'asyncio', 'multiprocessing', 'unittest', 'xml', 'email', 'http', 'urllib', 'ssl'}
    assert more or old or not loaded & others
