#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw before_after.jpg of the README from test_data/sky.tif, with automatic points."""
import sys
from pathlib import Path

import numpy as np
import tifffile
from matplotlib.image import imsave

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
import rmgradient  # noqa: E402

sky = tifffile.imread(here.parent / 'test_data' / 'sky.tif')
points, _ = rmgradient.choose_points(sky)
corrected = rmgradient.remove_gradient(sky, points)
before, after = rmgradient.stretch_midtones([sky.astype(float), corrected.astype(float)])
imsave(here / 'before_after.jpg', np.hstack([before, np.ones((len(sky), 8, 3)), after]), pil_kwargs={'quality': 85})
