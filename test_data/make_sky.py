#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw sky.tif, a picture of a sky that is not there, and skypoints, points on its background.

The background is known (`true_background`): the light of two towns below the horizon. In front of it are stars with a
power law of brightness and the colors of black bodies, a red nebula, and the noise of the camera.

usage: make_sky.py [FOLDER]     (default: the folder of this script)
"""
import struct
import sys
from pathlib import Path

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter

HEIGHT, WIDTH = 400, 600
NOISE = 60.0  # counts, standard deviation of each pixel
DARKEST = np.array([1800.0, 2000.0, 2200.0])  # counts of red, green and blue without glow
GLOW = np.array([4200.0, 3000.0, 2100.0])  # counts of the glow at its brightest: sodium lamps
NEBULA = (390, 190, 120, 80)  # center x, y and half axes, pixels


def glow_shape(x, y):
    """Return the glow from 0 to about 1; all colors have the same isolines."""
    near = np.exp(-((x + 40) ** 2 + 1.3 * (y - 430) ** 2) / (2 * 260.0**2))
    far = 0.35 * np.exp(-((x - 640) ** 2 + (y - 300) ** 2) / (2 * 190.0**2))
    return near + far


def true_background(height=HEIGHT, width=WIDTH):
    """Return the (height, width, 3) background, in counts."""
    y, x = np.mgrid[0:height, 0:width]
    return DARKEST + GLOW * glow_shape(x, y)[..., None]


def black_body_color(temperature):
    """Return red, green and blue of a black body by Planck's law at 610, 540 and 465 nm, relative to green."""
    wavelength = np.array([610e-9, 540e-9, 465e-9])
    radiance = wavelength**-5 / np.expm1(0.014388 / (wavelength * temperature))
    return radiance / radiance[1]


def add_stars(sky, rng, n_stars=1500):
    """Add stars: number ~ flux^-1.1 as on the real sky, Moffat profiles, temperatures of 3000 to 20000 K."""
    y, x = np.mgrid[-14:15, -14:15]
    flux = np.minimum(900 * rng.pareto(1.1, n_stars), 1.2e6)
    padded = np.zeros((HEIGHT + 28, WIDTH + 28, 3))
    for f in flux:
        row, column = rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH)
        profile = (1 + ((y - row % 1) ** 2 + (x - column % 1) ** 2) / 1.8**2) ** -3.0
        color = black_body_color(3000 * np.exp(rng.uniform(0, np.log(20 / 3))))
        padded[int(row):int(row) + 29, int(column):int(column) + 29] += (f / profile.sum()) * profile[..., None] * color
    sky += padded[14:-14, 14:-14]


def add_nebula(sky, rng):
    """Add clouds of hydrogen: noise of many scales in an ellipse."""
    center_x, center_y, half_x, half_y = NEBULA
    clouds = sum(4**i * gaussian_filter(rng.normal(size=(HEIGHT, WIDTH)), 2.0**i * 3, mode='wrap') for i in range(4))
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    inside = np.clip(1 - ((x - center_x) / half_x) ** 2 - ((y - center_y) / half_y) ** 2, 0, None) ** 1.5
    light = inside * np.clip(1.2 + clouds / clouds.std() * 0.5, 0, None)
    sky += 1300 * light[..., None] * np.array([1.0, 0.25, 0.35])


def srgb_profile():
    """Return a small ICC profile with the primaries of sRGB and a gamma of 2.2."""
    def number(value):
        return struct.pack('>i', round(value * 65536))

    def text(value):
        return b'desc' + bytes(4) + struct.pack('>I', len(value) + 1) + value + bytes(79)

    white = b'XYZ ' + bytes(4) + number(0.9642) + number(1.0) + number(0.8249)  # D50
    primaries = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]  # of sRGB, under D50
    curve = b'curv' + bytes(4) + struct.pack('>IH', 1, round(2.2 * 256)) + bytes(2)
    tags = {b'desc': text(b'sky RGB'), b'cprt': b'text' + bytes(4) + b'no rights reserved\0', b'wtpt': white}
    for color, xyz in zip(b'rgb', primaries):
        tags[bytes([color]) + b'XYZ'] = b'XYZ ' + bytes(4) + b''.join(map(number, xyz))
        tags[bytes([color]) + b'TRC'] = curve
    table, data = struct.pack('>I', len(tags)), b''
    for name, value in tags.items():
        table += name + struct.pack('>II', 128 + 4 + 12 * len(tags) + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack('>I4xI4s4s4s', 132 + 12 * len(tags) + len(data), 0x02400000, b'mntr', b'RGB ', b'XYZ ')
    head += struct.pack('>6H4s', 2020, 1, 1, 0, 0, 0, b'acsp')
    return head.ljust(68, b'\0') + white[8:] + bytes(48) + table + data


def choose_points(sky, background, rng):
    """Return lines of points: a jittered grid where there are neither stars nor nebula, and an isoline."""
    excess = gaussian_filter((sky - background).max(axis=2), 1.5)
    center_x, center_y, half_x, half_y = NEBULA
    measured = []
    for y0 in range(30, HEIGHT - 24, 68):
        for x0 in range(30, WIDTH - 24, 77):
            places = np.stack([x0 + rng.integers(-6, 30, 40), y0 + rng.integers(-6, 30, 40)], axis=1)
            places = [(excess[y - 24:y + 25, x - 24:x + 25].max(), x, y) for x, y in places
                      if 24 <= x < WIDTH - 24 and 24 <= y < HEIGHT - 24
                      and ((x - center_x) / (half_x + 24)) ** 2 + ((y - center_y) / (half_y + 24)) ** 2 > 1]
            if places and min(places)[0] < 2500:
                measured.append(min(places)[1:])
    # Across the nebula nothing can be measured, but the same glow is seen below it on the left.
    shape = glow_shape(*np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)))
    leader = min(measured, key=lambda p: abs(shape[p[1], p[0]] - shape[center_y, center_x]))
    lines = [f'{x} {y}' for x, y in measured if (x, y) != leader] + [f'{leader[0]} {leader[1]}']
    for x in (center_x - 60, center_x, center_x + 60):
        y = center_y - 70 + np.abs(shape[center_y - 70:center_y + 71, x] - shape[leader[1], leader[0]]).argmin()
        lines.append(f'-{x} -{y}')
    return lines


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
    folder = folder if folder.is_dir() else folder.parent
    rng = np.random.default_rng(1499)
    background = true_background()
    sky = background.copy()
    add_stars(sky, rng)
    add_nebula(sky, rng)
    points = choose_points(sky, background, rng)
    sky += rng.normal(0, NOISE, sky.shape)
    tifffile.imwrite(folder / 'sky.tif', np.rint(np.clip(sky, 0, 65535)).astype(np.uint16), photometric='rgb',
                     compression='zlib', compressionargs={'level': 9}, predictor=True, rowsperstrip=50,
                     iccprofile=srgb_profile(), metadata=None, software='make_sky.py', description='A drawn sky')
    (folder / 'skypoints').write_text('\n'.join(points) + '\n', encoding='ascii')


if __name__ == '__main__':
    main()
