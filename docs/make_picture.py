#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of the README and of the pages beside this script from test_data/sky.tif."""
import sys
import warnings
from pathlib import Path

import matplotlib.figure
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
side_by_side('before_after.jpg', stretch(sky.astype(float)), stretch(corrected('gray')))  # each on its own

# Each level on its own stretch, too, as programs display it, with the level and the pixels that became black.
figure = matplotlib.figure.Figure(figsize=(12, 3.2), layout='constrained')
for axes, level in zip(figure.subplots(1, 3), ('gray', 'color', 'darkest')):
    result, found = corrected(level), rmgradient.find_correction(sky, points, sky=level)
    axes.imshow(stretch(result))
    axes.set_title(f'--sky {level}: {", ".join(f"{value:.0f}" for value in found.sky)}', fontsize=9)
    axes.set_axis_off()
figure.savefig(here / 'sky_levels.jpg', dpi=90)


# The preview of the points that come with the picture, and the window of the editor, with two bad points.
lines = (here.parent / 'test_data' / 'skypoints').read_text().splitlines()
given = rmgradient.make_points(rmgradient.parse_points_file(lines)[0])
picture = rmgradient.open_picture(here.parent / 'test_data' / 'sky.tif')
with open(here / 'preview.jpg', 'wb') as file:
    rmgradient.draw_preview(file, 'jpg', picture, rmgradient.find_correction(picture, given))

matplotlib.use('Agg')
few = [*points.centers[::2], (395, 195), (10, 200)]
editor = rmgradient.Editor(picture, few, rmgradient.Settings(), None)
editor.figure.savefig(here / 'editor.jpg', dpi=90)


# Good points, one on the nebula, and all in one corner, with their results.
good = rmgradient.make_points(points.centers[::2])
choices = {'all over the frame, off the nebula': good,
           'one more, on the nebula': rmgradient.make_points([*good.centers, (395, 195)]),
           'all in one corner': rmgradient.make_points([(x, y) for x, y in points.centers if x < 260 and y > 240])}
figure = matplotlib.figure.Figure(figsize=(12, 5.6), layout='constrained')
for (above, below), (title, chosen) in zip(figure.subplots(2, 3).T, choices.items()):
    above.imshow(stretch(sky.astype(float)))
    above.set_title(title)
    bad = [len(chosen.x) - 1] if 'on the' in title else []
    rmgradient.draw_points(above, chosen, bad, 24)
    # With one stretch, so that lost light is visible.
    result = rmgradient.remove_gradient(sky, chosen, sky=3100.0).astype(float)
    below.imshow(stretch(result, rmgradient.remove_gradient(sky, good, sky=3100.0).astype(float)))
    for axes in (above, below):
        axes.set_axis_off()
figure.savefig(here / 'points.jpg', dpi=90)


# Defects that the check of the result names: a step, a dark edge, and a glow in a corner.
y, x = np.mgrid[:400, :600].astype(float)
plain = 1000 + 0.4 * x + 0.2 * y + np.random.default_rng(1).normal(0, 10, x.shape)
inner = [(x, y) for x in range(80, 560, 88) for y in range(80, 360, 60)]
left = {'step': 40.0 * (x > 240), 'edge': -60 * np.clip((40 - x) / 40, 0, 1),
        'corner': 300 * np.exp(-np.hypot(x, y) / 25)}
figure = matplotlib.figure.Figure(figsize=(12, 3.2), layout='constrained')
with warnings.catch_warnings(action='ignore'):
    for axes, (kind, defect) in zip(figure.subplots(1, 3), left.items()):
        frame = (plain + defect)[..., None]
        correction = rmgradient.find_correction(frame, inner)
        result = correction.apply(frame)
        axes.imshow(np.repeat(stretch(result), 3, axis=2))
        axes.set_title(next(each.text for each in correction.findings if each.kind == kind).split(',')[0]
                       .partition(' than')[0], fontsize=9)
        axes.set_axis_off()
figure.savefig(here / 'messages.jpg', dpi=90)
