#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of the README from test_data/sky.tif, with automatic points: before_after.jpg, sky_levels.jpg."""
import sys
from pathlib import Path

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
