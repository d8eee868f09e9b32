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
