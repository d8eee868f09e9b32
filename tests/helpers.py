# SPDX-License-Identifier: Apache-2.0
"""What tests share: drawn skies, points on them, and the command line run in this process."""
import os
import re
import sys
from pathlib import Path

# As the command has it, before numpy is loaded: more threads of the BLAS would only wait for each other.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import numpy as np
import pytest
import tifffile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'test_data')]

import rmgradient as rg

posix = pytest.mark.skipif(os.name == 'nt', reason='needs POSIX')


def draw(height=90, width=120, n_channels=3, dtype=np.uint16, noise=20.0, seed=1):
    """Return a (height, width, n_channels) sky of a plane gradient, noise and a few stars, and its background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    color = np.linspace(1, 0.7, n_channels)
    background = 3000 + (8.0 * x - 5.0 * y)[..., None] * color
    sky = background + rng.normal(0, noise, background.shape)
    for _ in range(5):
        row, column = rng.integers(0, height), rng.integers(0, width)
        sky += 4000 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / 2)[..., None]
    scale = {'f': 1 / 65535, 'u': 1, 'i': 1}[np.dtype(dtype).kind]
    if np.dtype(dtype).itemsize == 1:
        scale = 1 / 64
    if np.dtype(dtype) == np.int8:
        scale = 1 / 128
    sky, background = sky * scale, background * scale
    return (sky if np.dtype(dtype).kind == 'f' else np.rint(sky)).astype(dtype), background


def scatter(height=90, width=120, n=12, margin=24, seed=2):
    """Return (n, 2) different places, (x, y), at least margin from the border."""
    rng = np.random.default_rng(seed)
    places = [(x, y) for y in range(margin, height - margin) for x in range(margin, width - margin)]
    return np.array(places)[rng.choice(len(places), n, replace=False)]


def measured(points, levels, noise=0.0):
    """Return levels at points as if measured, with (n_points, n_channels) noise or the same everywhere."""
    return rg.Measured(points, levels, np.broadcast_to(noise, levels.shape))


def fit(points, levels, smooth='auto'):
    """Return the Fit through levels at points."""
    return rg.fit_background(measured(points, levels), smooth)


class Drawn:
    """A background that is a (height, width, n_channels) array, where a BackgroundModel is expected."""

    def __init__(self, background):
        self.background, self.n_channels = background, background.shape[2]

    def above(self, sky):
        return Drawn(self.background - sky)

    def blocks(self, start, stop, width):
        for top in range(0, stop - start, 13):
            rows = slice(top, min(top + 13, stop - start))
            yield rows, slice(0, width), self.background[start:stop][rows].copy()

    def evaluate(self, start, stop, width):
        return self.background[start:stop].copy()


def correction(image, background, sky=0.0, **settings):
    """Return the Correction of an image with a background, (height, width, n_channels), and a level of the sky."""
    n_channels = background.shape[2]
    levels = np.full((3, n_channels), settings.pop('level', 7.0))
    fitted = rg.Fit(measured(rg.make_points([(0, 0), (1, 0), (0, 1)]), levels), Drawn(background))
    return rg.Correction(fitted, np.zeros(n_channels) + sky, rg.as_picture(image), rg.Settings(**settings), [])


def correct(image, shift, method='subtract', sky=0.0, dither=False):
    """Return an image without a background that is as far above the sky as shift; zeros are data in it."""
    shift = np.broadcast_to(shift, image.shape)
    image = np.pad(image, ((0, 0), (1, 1), (0, 0)), constant_values=1)
    background = np.pad(shift, ((0, 0), (1, 1), (0, 0)), constant_values=0.5) + sky
    return correction(image, background, sky, method=method, dither=dither).apply(image)[:, 1:-1]


def words(points):
    """Return coordinates as the words of a command line."""
    return [str(value) for value in np.ravel(points)]


class Cli:
    """Runs the command line in this process, in a folder of its own that holds a sky."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.sky, _ = draw()
        tifffile.imwrite('sky.tif', self.sky, photometric='rgb')
        self.points = scatter()

    def __call__(self, *arguments, points=None):
        if points is None:
            points = ['-p', *words(self.points)]
        try:
            picture = [] if '-i' in arguments else ['-i', 'sky.tif']
            status = rg.main([*picture, '-o', 'out.tif', *map(str, arguments), *map(str, points)])
        except SystemExit as stop:
            status = stop.code
        output = self.capsys.readouterr()
        assert output.out == ''
        self.stderr = output.err
        return status

    def files(self):
        return sorted(path.name for path in self.folder.iterdir())

    def fails(self, *arguments, status=1, match, **more):
        """Expect one line of error and nothing left behind."""
        before = {path: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        assert self(*arguments, **more) == status, self.stderr
        lines = [line for line in self.stderr.splitlines() if 'error: ' in line]
        assert len(lines) == 1
        assert lines[0].startswith('rmgradient: error: ')
        assert match in lines[0]
        assert not re.search(r'(\S+: )\1', lines[0]), 'a file is named twice'
        assert status == 2 or all(line.startswith('rmgradient: ') for line in self.stderr.splitlines()), self.stderr
        assert 'Traceback' not in self.stderr
        after = {path: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        assert before == after
        return lines[0]
