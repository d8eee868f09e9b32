#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw the fields of gallery.rst, or the pictures of gallery.rst and when.rst.

usage: make_gallery.py FOLDER     write the fields, TIFF files, into a new folder
       make_gallery.py            run the commands of gallery.rst, and draw the pictures beside this script
"""
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here.parent / 'test_data')]
import make_sky  # noqa: E402

import rmgradient  # noqa: E402

HEIGHT, WIDTH, NOISE = make_sky.HEIGHT, make_sky.WIDTH, 50.0
Y, X = np.mgrid[:HEIGHT, :WIDTH].astype(float)
RED, LAMP = np.array([1.0, 0.3, 0.4]), np.array([1.0, 0.72, 0.5])


def glow(x, y, width, height=3500.0):
    """Return a dome of light around a place, (height, width, 3)."""
    return height * np.exp(-((X - x) ** 2 + (Y - y) ** 2) / (2 * width**2))[..., None] * LAMP


def clouds(rng, softness=3.0):
    """Return structure of many scales, about 0 to 3."""
    noise = sum(4**i * gaussian_filter(rng.normal(size=(HEIGHT, WIDTH)), softness * 2.0**i, mode='wrap')
                for i in range(4))
    return np.clip(1.2 + 0.5 * noise / noise.std(), 0, None)


def ellipse(x, y, half_x, half_y):
    """Return a shape that falls from 1 in the middle to 0 at the edge of an ellipse."""
    return np.clip(1 - ((X - x) / half_x) ** 2 - ((Y - y) / half_y) ** 2, 0, None) ** 1.5


def expose(rng, light, background, noise=NOISE):
    """Return a uint16 exposure of light through a background."""
    return np.clip(np.rint(light + background + rng.normal(0, noise, light.shape)), 0, 65535).astype(np.uint16)


def stars(rng, n=1200):
    sky = np.zeros((HEIGHT, WIDTH, 3))
    make_sky.add_stars(sky, rng, n)
    return sky


def draw_fields(folder):
    """Write the fields of gallery.rst into a new folder."""
    if folder.exists():
        sys.exit(f'{folder} exists; delete it first')
    folder.mkdir(parents=True)
    (folder / 'night').mkdir()

    def write(name, picture):
        tifffile.imwrite(folder / name, picture, photometric='rgb' if picture.ndim == 3 else 'minisblack')

    rng = np.random.default_rng(11)
    write('glow.tif', expose(rng, stars(rng), 1800 + glow(-60, 430, 280) + glow(660, 320, 180, 1500)))

    nebula = 1500 * (ellipse(330, 200, 170, 110) * clouds(rng))[..., None] * RED
    write('nebula.tif', expose(rng, stars(rng) + nebula, 1800 + glow(620, -40, 330)))

    light = stars(rng, 2500) + 900 * clouds(rng, 5)[..., None] * RED
    write('full.tif', expose(rng, light, 1800 + glow(-40, -60, 320, 4500)))
    write('last_year.tif', expose(rng, 0.6 * light, 900 + glow(700, 460, 500, 400), 20.0))

    horizon = 300 + 25 * np.sin(X[0] / 60) + 12 * np.sin(X[0] / 17) + gaussian_filter(rng.normal(0, 12, WIDTH), 2)
    is_land = horizon < Y
    land = np.where(is_land, 700 + 120 * clouds(rng, 1), 0)[..., None] * np.array([0.8, 1.0, 0.7])
    sky = stars(rng) + 1500 * (ellipse(430, 110, 70, 55) * clouds(rng))[..., None] * RED
    background = 1500 + glow(150, 380, 260, 3500)
    write('land.tif', expose(rng, np.where(is_land[..., None], land, sky), np.where(is_land[..., None], 0, background)))
    write('land_mask.tif', np.where(gaussian_filter(is_land.astype(float), 4) > 0.02, 255, 0).astype(np.uint8))

    nebula = 1200 * (ellipse(300, 210, 200, 120) * clouds(rng))[..., None] * RED
    light = stars(rng) + nebula
    for i, (x, height) in enumerate(((-80, 5000), (250, 2500), (700, 500)), 1):
        write(f'night/{i}.tif', expose(rng, light, 1800 + glow(x, 450, 300, height)))


def stretched(picture):
    """Return a picture as it is displayed, with a stretch of its own."""
    return rmgradient.stretch_midtones(picture.astype(float))


def panels(name, rows, dpi=80):
    """Draw rows of {title: displayed picture} into a file beside this script."""
    figure = Figure(figsize=(4.2 * len(rows[0]), 3.05 * len(rows)), layout='constrained')
    for axes, (title, picture) in zip(np.ravel(figure.subplots(len(rows), len(rows[0]), squeeze=False)),
                                      [each for row in rows for each in row.items()]):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    figure.savefig(here / name, dpi=dpi, pil_kwargs={'quality': 85})


def draw_gallery():
    """Run the commands of gallery.rst, and draw each field before and after."""
    commands = re.findall(r'^    ((?:mkdir|rmgradient) .+)$', (here / 'gallery.rst').read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as parent, contextlib.chdir(parent):
        draw_fields(Path('fields'))
        os.chdir('fields')
        for command in commands:
            print(command, flush=True)
            subprocess.run(command.replace('rmgradient', f'"{sys.executable}" "{here.parent}/rmgradient.py"', 1)
                           if command.startswith('rm') else command, shell=True, check=True)
        for name in ('glow', 'nebula', 'full', 'land'):
            panels(f'gallery_{name}.jpg', [{part: stretched(tifffile.imread(path)) for part, path in
                                            (('before', f'{name}.tif'), ('after', f'{name}_out.tif'))}])
        panels('gallery_night.jpg', [{f'{part} {i}': stretched(tifffile.imread(f'{folder}/{i}.tif')) for i in (1, 2, 3)}
                                     for part, folder in (('before', 'night'), ('after', 'level'))])


def draw_when():
    """Draw what goes wrong after stretching, and what dividing is for."""
    rng = np.random.default_rng(5)
    places = np.array([(x, y) for x in range(26, 600, 61) for y in range(26, 400, 58)])

    def correct(picture, nebulae, **settings):
        distances = np.hypot(*(places[:, None] - nebulae).transpose(2, 0, 1))
        points = places[distances.min(axis=1) > 90]
        return rmgradient.remove_gradient(picture, points, **settings).astype(float)

    def draw(nebulae, brightness):
        light = sum(ellipse(x, y, 65, 65) for x, y in nebulae) * (0.5 + 0.5 * clouds(rng))
        return stars(rng) + brightness * light[..., None] * RED

    nebulae = [(150, 190), (450, 190)]
    sky = expose(rng, draw(nebulae, 900), 1500 + glow(0, 200, 250, 9000))
    late = correct(stretched(sky).astype(np.float32), nebulae, sky=0.25)
    panels('when_linear.jpg', [{'before': stretched(sky), 'corrected, then stretched': stretched(correct(sky, nebulae)),
                                'stretched, then corrected': stretched(late)}])

    nebulae = [(95, 90), (300, 200), (505, 310)]
    shade = 1 / (1 + 3 * ((X - 300) ** 2 + (Y - 200) ** 2) / (300**2 + 200**2))[..., None]
    sky = expose(rng, draw(nebulae, 250) * shade, 2600 * shade * [1, 1, 1], 12.0)
    panels('when_divide.jpg', [{'before': stretched(sky), 'subtracted': stretched(correct(sky, nebulae)),
                                'divided': stretched(correct(sky, nebulae, method='divide'))}])


if __name__ == '__main__':
    if len(sys.argv) > 1:
        draw_fields(Path(sys.argv[1]))
    else:
        draw_gallery()
        draw_when()
