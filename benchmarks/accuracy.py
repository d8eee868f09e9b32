#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure errors of background models on skies with a known background, and print a table (reStructuredText).

There are five kinds of skies with noise (flat, plane, one and two light domes, dome with vignetting), and three
layouts of points (a dozen, forty scattered, a grid around a hole). The error is the RMS of model minus truth over the
frame, without its mean. The table has geometric means over all skies and seeds, half a count added. The adaptive model
is compared with the classic one, a plain multiquadric, and with a thin-plate spline with a linear term, which other
programs use. Then automatic points are tested on the same skies with stars, with and without a nebula on a quarter of
the frame. The last part is about automatic points on frames full of nebula. There, the gradient itself is the error
without a correction.

usage: accuracy.py [--quick] [--picture FILE]
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rmgradient as rg  # noqa: E402

HEIGHT, WIDTH = 400, 600
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
U, V = X / WIDTH, Y / HEIGHT


def backgrounds(rng):
    """Yield name and (HEIGHT, WIDTH) background in counts."""
    a, b, c = rng.uniform(-0.1, 0.1, 3)
    dome = 3000 + 4000 * np.exp(-((U + 0.1 + a) ** 2 + (V - 1.1 + b) ** 2) / (0.5 + c))
    yield 'flat', np.full((HEIGHT, WIDTH), 3000.0)
    yield 'plane', 3000 + 2000 * (1 + a) * U - 900 * (1 + b) * V
    yield 'dome', dome
    yield 'two domes', dome + 1500 * np.exp(-((U - 1) ** 2 + (V - 0.8 + a) ** 2) / 0.1)
    yield 'dome, vignetting', dome * (1 - (0.35 + b) * ((U - 0.5) ** 2 + (V - 0.5) ** 2))


def layouts(rng):
    """Yield name and (n, 2) points."""
    def draw(n):
        return np.unique(np.c_[rng.integers(24, WIDTH - 24, n), rng.integers(24, HEIGHT - 24, n)], axis=0)
    yield 'few', draw(12)
    yield 'scattered', draw(40)
    grid = np.meshgrid(np.linspace(24, WIDTH - 25, 8), np.linspace(24, HEIGHT - 25, 6))
    grid = np.stack(grid, axis=-1).reshape(-1, 2)
    yield 'around a hole', grid[((grid[:, 0] - 330) / 150) ** 2 + ((grid[:, 1] - 200) / 110) ** 2 > 1].astype(int)


def models(points, levels):
    """Yield name and (HEIGHT, WIDTH) background."""
    channel = levels[:, None]
    measured = rg.Measured(rg.make_points(points), channel, np.full_like(channel, 10.0))
    for name, smooth in [('adaptive', 'auto'), ('multiquadric', 0.1)]:
        yield name, rg.fit_background(measured, smooth).model.evaluate(0, HEIGHT, WIDTH)[..., 0]
    spline = RBFInterpolator(points.astype(float), levels, kernel='thin_plate_spline', degree=1)
    yield 'thin-plate spline', spline(np.c_[X.ravel(), Y.ravel()].astype(float)).reshape(X.shape)


def stars(rng):
    """Return (HEIGHT, WIDTH) light of stars, number ~ flux^-1.1."""
    light = np.zeros((HEIGHT + 16, WIDTH + 16))
    y, x = np.mgrid[-8:9, -8:9]
    for flux in np.minimum(300 * rng.pareto(1.1, 250), 60000):
        row, column = rng.integers(0, HEIGHT), rng.integers(0, WIDTH)
        light[row:row + 17, column:column + 17] += flux * np.exp(-(x**2 + y**2) / 4)
    return light[8:-8, 8:-8]


def clouds(rng):
    """Return (HEIGHT, WIDTH) clouds of many sizes, of mean 0 and deviation 1."""
    layers = [2.0**i * gaussian_filter(rng.normal(size=(HEIGHT, WIDTH)), 2.0**i * 3, mode='wrap') * 2.0**i
              for i in range(5)]
    total = sum(layers)
    return (total - total.mean()) / total.std()


def full_of_nebula(rng):
    """Yield name and (HEIGHT, WIDTH) light of nebulae, of deviation 1, that leave little or no sky."""
    yield 'some empty sky', np.maximum(clouds(rng) - rng.uniform(-0.8, 0), 0)
    yield 'shines everywhere', np.exp(0.8 * clouds(rng))
    yield 'dark lanes', np.clip(1.5 - np.maximum(clouds(rng), 0), 0, None)
    angle = rng.uniform(0, np.pi)
    distance = (X - WIDTH / 2) * np.sin(angle) + (Y - HEIGHT / 2) * np.cos(angle)
    yield 'band', np.exp(-((distance / rng.uniform(80, 160)) ** 2)) * np.clip(1.2 + 0.6 * clouds(rng), 0, None)


def measure_full_frames(seeds):
    """Print errors on frames full of nebula, in parts of the noise of a pixel."""
    rows = {}
    for seed in seeds:
        rng = np.random.default_rng([3, seed])
        for (kind, light), (_, truth) in zip(full_of_nebula(rng), list(backgrounds(rng))[1:]):
            gradient = 300 * (truth - truth.mean()) / np.ptp(truth)
            light = light / light.std() * rng.uniform(400, 2000)
            sky = 5000 + gradient + light - light.min() + rng.normal(0, 50, truth.shape)
            fit = rg.fit_background(rg.choose_points(np.rint(sky).astype(np.uint16)))
            error = (fit.model.evaluate(0, HEIGHT, WIDTH)[..., 0] - gradient).std()
            rows.setdefault(kind, []).append((error / 50, gradient.std() / 50, light.std() / 50))
    rule = ' '.join(['=' * 18] + ['=' * 10] * 3)
    print(f'\nFrames full of nebula: RMS in parts of the noise of a pixel, geometric means\n\n{rule}')
    print(f'{"nebula":18} {"error":10} {"gradient":10} {"nebula":10}\n{rule}')
    for kind, values in rows.items():
        print(f'{kind:18} ' + ' '.join(f'{value:<10.2f}' for value in np.exp(np.log(values).mean(axis=0))))
    print(rule)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='one seed instead of five, to see that it runs')
    parser.add_argument('--picture', help='draw the errors, too (PNG, PDF or SVG)')
    options = parser.parse_args()
    seeds = [1] if options.quick else [1, 2, 3, 4, 5]
    errors, automatic = {}, {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for name, truth in backgrounds(rng):
            for layout, points in layouts(rng):
                levels = truth[points[:, 1], points[:, 0]] + rng.normal(0, 10, len(points))
                for model, background in models(points, levels):
                    errors.setdefault(model, {}).setdefault(layout, []).append((background - truth).std())
            light, noise = stars(rng), rng.normal(0, 50, truth.shape)
            nebula = 1500 * np.clip(1 - ((U - 0.5) / 0.3) ** 2 - ((V - 0.5) / 0.27) ** 2, 0, None) ** 0.7
            for kind, sky in [('stars', truth + light + noise), ('stars and nebula', truth + light + noise + nebula)]:
                sky = np.clip(np.rint(sky), 0, 65535).astype(np.uint16)[..., None]
                fit = rg.fit_background(rg.choose_points(sky))
                difference = fit.model.evaluate(0, HEIGHT, WIDTH)[..., 0] - truth
                automatic.setdefault(name, {}).setdefault(kind, []).append(difference.std())

    def mean(values):
        return np.exp(np.log(np.array(values) + 0.5).mean()) - 0.5

    columns = ['few', 'scattered', 'around a hole']
    rule = ' '.join(['=' * 18] + ['=' * 14] * 3)
    print(f'RMS error in counts, noise of levels 10, seeds {seeds}\n\n{rule}')
    print(f'{"model":18} ' + ' '.join(f'{name:14}' for name in columns) + f'\n{rule}')
    for model, by_layout in errors.items():
        print(f'{model:18} ' + ' '.join(f'{mean(by_layout[name]):<14.1f}' for name in columns))
    print(rule)
    rule = ' '.join(['=' * 18] + ['=' * 17] * 2)
    print(f'\nAutomatic points: median and largest RMS error in counts, noise of pixels 50\n\n{rule}')
    print(f'{"background":18} {"stars":17} {"stars and nebula":17}\n{rule}')
    for name, by_kind in automatic.items():
        cells = [f'{np.median(by_kind[kind]):.1f}, {max(by_kind[kind]):.1f}' for kind in ('stars', 'stars and nebula')]
        print(f'{name:18} ' + ' '.join(f'{cell:17}' for cell in cells))
    print(rule)
    measure_full_frames(seeds)
    if options.picture:
        means = {model: [mean(by_layout[name]) for name in columns] for model, by_layout in errors.items()}
        draw(options.picture, means, columns, automatic)


def draw(path, errors, layouts, automatic):
    """Draw the errors of models by layout, and of automatic points by background, a dot a sky."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (model, values) in enumerate(errors.items()):
        bars = left.bar(np.arange(len(layouts)) + 0.27 * (i - 1), values, 0.25, label=model)
        left.bar_label(bars, fmt='%.3g', fontsize=8)
    left.set_xticks(range(len(layouts)), layouts)
    left.set_title('models through given points')
    left.set_ylabel('RMS error in counts')
    for i, (kind, color) in enumerate([('stars', 'tab:blue'), ('stars and nebula', 'tab:red')]):
        for j, by_kind in enumerate(automatic.values()):
            found = np.maximum(by_kind[kind], 0.3)
            right.plot(np.full(len(found), j + 0.2 * i - 0.1), found, 'o', color=color, alpha=0.6,
                       label=kind if j == 0 else None)
    right.set_xticks(range(len(automatic)), [name.replace(', ', ',\n') for name in automatic])
    right.set_title('automatic points')
    left.set_yscale('log')
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(axis='y', alpha=0.3)
    figure.savefig(path, dpi=90)


if __name__ == '__main__':
    main()
