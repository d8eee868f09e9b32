#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure time and memory of rmgradient, beside a plain copy of the file, and print a table (reStructuredText).

Each row is the median of several runs of whole processes, each in turn with the copy, which is as durable: read and
written by tifffile, synchronized. Direct evaluation, `Rbf` on all pixels in groups of 100 rows, is measured on
a few groups and multiplied; it counts twice, since the pedestal is needed before the first pixel is written. For
deflate the time of the encoder alone, on all cores, stands in the last column.

usage: speed.py [--runs N] [--folder DIR] [--quick | --gigapixel] [RMGRADIENT.py]
"""
import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
from scipy.interpolate import Rbf

COPY = ("import os, numpy, tifffile; from scipy.interpolate import Rbf; f = open('copy.tif', 'w+b'); "
        "tifffile.imwrite(f, tifffile.imread('{}')); f.flush(); os.fsync(f.fileno())")
ENCODE = """
import imagecodecs, tifffile, concurrent.futures
picture = tifffile.imread('{}')
def encode(y):
    return imagecodecs.deflate_encode(imagecodecs.delta_encode(picture[y:y + 100], axis=-2).tobytes(), 1)
with concurrent.futures.ThreadPoolExecutor(len(__import__('os').sched_getaffinity(0))) as pool:
    for data in pool.map(encode, range(0, len(picture), 100)):
        pass
"""


def run(command, folder):
    """Run a command; return seconds and peak memory in MB (Linux), asked for every few milliseconds."""
    peak = 0
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder)
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f'/proc/{process.pid}/status').read_text().splitlines()
            peak = int(next(line for line in status if line.startswith('VmHWM')).split()[1]) / 1024
        time.sleep(0.002)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f'{command}: {process.returncode}')
    return seconds, peak


def make_picture(path, width, height, rowsperstrip=100, **options):
    """Write a sky of a gradient and noise, strip by strip."""
    rng = np.random.default_rng(1)
    ramp = np.linspace(1000, 3000, width)[None, :, None] * [1.0, 0.8, 0.6]
    noise = rng.normal(0, 50, (257, width, 3))  # drawn once: its rows come again, with another level

    def strips():
        for y in range(0, height, rowsperstrip):
            rows = np.arange(y, min(y + rowsperstrip, height))
            strip = (ramp + noise[rows % 257] + 1500 * rows[:, None, None] / height).astype(np.uint16)
            if options.get('compression'):
                yield encode(strip, options['compression'])
            else:
                yield strip.tobytes()

    tifffile.imwrite(path, strips(), shape=(height, width, 3), dtype=np.uint16, photometric='rgb',
                     planarconfig='contig', rowsperstrip=rowsperstrip, metadata=None,
                     bigtiff=width * height * 6 > 2**32 - 2**26,
                     predictor=2 if options.get('compression') else None, **options)


def encode(strip, compression):
    import imagecodecs
    data = imagecodecs.delta_encode(strip, axis=-2).tobytes()
    return imagecodecs.lzw_encode(data) if compression == 'lzw' else imagecodecs.deflate_encode(data, 1)


def draw_points(n, width, height):
    rng = np.random.default_rng(2)
    return np.unique(np.c_[rng.integers(24, width - 24, n), rng.integers(24, height - 24, n)], axis=0)


def direct_seconds(points, width, height):
    """Return the time that two passes of direct evaluation on all pixels would take, from two groups of rows."""
    rng = np.random.default_rng(3)
    rbf = Rbf(*points.T.astype(float), rng.normal(1000, 50, (len(points), 3)), mode='N-D', smooth=0.1)
    rows = min(100, height)
    y, x = np.mgrid[0.0:rows, 0.0:width]
    rbf(x[:1], y[:1])
    start = time.perf_counter()
    for _ in range(2):
        rbf(x, y)
    return (time.perf_counter() - start) * height / rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('script', nargs='?', default=Path(__file__).resolve().parent.parent / 'rmgradient.py')
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--folder', help='where to write the pictures (default: a temporary folder)')
    parser.add_argument('--quick', action='store_true', help='pictures a tenth as wide and high, to see that it runs')
    parser.add_argument('--gigapixel', action='store_true', help='also 32000 x 32000 pixels: 12 GB of files')
    options = parser.parse_args()
    cases = [  # name, width, height, points, options, how the input is written, rows of its strips
        ('uncompressed', 6000, 4000, 40, [], {}, 100),
        ('uncompressed', 6000, 4000, 500, [], {}, 100),
        ('uncompressed', 6000, 16000, 40, [], {}, 100),
        ('deflate out', 6000, 4000, 40, ['-c', '1'], {}, 100),
        ('deflate in', 6000, 4000, 40, [], {'compression': 'zlib'}, 16),
        ('LZW in', 6000, 4000, 40, [], {'compression': 'lzw'}, 16),
        ('one strip in', 6000, 4000, 40, [], {'compression': 'zlib'}, 4000),
    ]
    if options.quick:
        options.runs, cases = 1, [(name, width // 10, height // 10, *rest) for name, width, height, *rest in cases]
    if options.gigapixel:
        cases.append(('uncompressed', 32000, 32000, 40, [], {}, 100))
    processor = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    print(f'{len(os.sched_getaffinity(0))} cores, {processor}; Python {platform.python_version()}, '
          f'numpy {np.__version__}, tifffile {tifffile.__version__}; medians of {options.runs} runs\n')
    rule = ' '.join('=' * n for n in (14, 13, 6, 8, 8, 8, 9, 9, 9))
    names = f"{'file':14} {'pixels':13} points {'time':8} {'memory':8} {'copy':8} time/copy direct/t. encoder"
    print(rule, names, rule, sep='\n')
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, width, height, n_points, arguments, writing, rows in cases:
            make_picture(Path(folder, 'in.tif'), width, height, rows, **writing)
            points = draw_points(n_points, width, height)
            command = [sys.executable, str(options.script), '-q', '-i', 'in.tif', '-o', 'out.tif', *arguments,
                       '-p', *map(str, points.ravel())]
            large = width * height > 2e8
            ours, copies, memory = [], [], 0
            for _ in range(1 if large else options.runs):
                if not large:  # tifffile would read it whole
                    copies.append(run([sys.executable, '-c', COPY.format('in.tif')], folder)[0])
                    Path(folder, 'copy.tif').unlink()
                seconds, peak = run(command, folder)
                ours.append(seconds)
                memory = max(memory, peak)
                Path(folder, 'out.tif').unlink()
            encoder = ''
            if arguments:
                alone = [run([sys.executable, '-c', ENCODE.format('in.tif')], folder)[0] for _ in range(3)]
                encoder = f'{statistics.median(alone):.2f} s'
            took, copy = statistics.median(ours), statistics.median(copies) if copies else None
            print(f'{name:14} {f"{width} x {height}":13} {n_points:<6} {f"{took:.2f} s":8} {f"{memory:.0f} MB":8} '
                  f'{f"{copy:.2f} s" if copy else "":8} {f"{took / copy:.2f}" if copy else "":9} '
                  f'{direct_seconds(points, width, height) / took:<9.0f} {encoder}', flush=True)
    print(rule)


if __name__ == '__main__':
    main()
