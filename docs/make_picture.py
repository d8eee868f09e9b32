#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of the README from test_data/sky.tif, with automatic points."""
import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tifffile
from matplotlib.image import imsave

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
import rmgradient  # noqa: E402

sky = tifffile.imread(here.parent / 'test_data' / 'sky.tif')
points = rmgradient.choose_points(sky).points


def side_by_side(name, *pictures):
    gap = np.ones((len(sky), 8, 3))
    row = [part for picture in pictures for part in (picture, gap)][:-1]
    imsave(here / name, np.hstack(row), pil_kwargs={'quality': 85})


def corrected(level):
    return rmgradient.remove_gradient(sky, points, sky=level).astype(float)


stretch = rmgradient.stretch_midtones
side_by_side('before_after.jpg', stretch(sky.astype(float)), stretch(corrected('gray')))
# The same stretch for all three, so that levels compare.
side_by_side('sky_levels.jpg', *(stretch(corrected(level), corrected('gray'))[:, 100:500]
                                 for level in ('gray', 'color', 'darkest')))


# The preview, and the window of the editor, with two points that are not on empty sky.
levels, _ = rmgradient.measure_levels(sky, points)
model = rmgradient.fit_background(points, levels)
level = rmgradient.find_sky('gray', 'subtract', levels, model, *sky.shape[:2])
with open(here / 'preview.jpg', 'wb') as file:
    rmgradient.draw_preview(file, 'jpg', sky, points, [], model, 'subtract', level, 24)

matplotlib.use('Agg')
few = [*points.centers[::2], (395, 195), (10, 200)]
settings = argparse.Namespace(auto=None, sigma=8.0, smooth='auto', method='subtract', sky=None)
editor = rmgradient.Editor(sky, few, settings, 'sky.tif', None)
editor.figure.savefig(here / 'editor.jpg', dpi=90)
