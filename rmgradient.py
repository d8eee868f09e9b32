#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "scipy>=1.11.2", "tifffile[codecs]>=2024.8.10", "threadpoolctl>=3.1.0",
#     "tqdm>=4.60.0"]
# ///
r"""Remove the background gradient from a TIFF or FITS picture of the sky.

The program measures the color of the sky at points of empty sky. It fits a
smooth surface through these levels and subtracts it, so that the background
becomes level and gray.

Points are pairs X Y of pixels, counted from the top left pixel (0 0), x to
the right and y down. -a chooses them automatically. -f reads them from a
file, one pair in each line.

An isoline is a line of equal background. A pair with a minus sign before
either number (-0 too) is on the isoline of the last pair without one. It gets
the same level, and nothing is measured there.

Outputs appear complete or not at all. If one of several pictures fails, the
others are still corrected.

Exit status:
0 if all pictures are corrected, 1 if something is wrong with a picture, the
points or a file, 2 for wrong usage, 130, 143 or 129 after SIGINT, SIGTERM or
SIGHUP.

Examples:

    # choose the points automatically
    python rmgradient.py -i test_data/sky.tif -o sky_auto.tif -a
    # your own points, from a file
    python rmgradient.py -i test_data/sky.tif -o sky_file.tif \
        -f test_data/skypoints
    # the same through xargs; also write the background
    cat test_data/skypoints | xargs python rmgradient.py \
        -i test_data/sky.tif -o sky_out.tif -b sky_background.tif -p
"""
# The sections of this file are in the order of the work. Each uses only those above it. Levels are measured at points
# of a picture (Measured). A surface is fitted to the levels (Fit). It corrects each pixel (Correction).
# - Process, Errors and settings;
# - numbers, without files or messages: Points, Pictures, Tiles, Levels, Choice of the model, Model and fit, Misfits,
#   Reference, Automatic points, Sky level, Correction, Check of the result, Chain;
# - files: Picture files, TIFF directories, TIFF, FITS, Formats, Files;
# - users: Display, Pipeline, Command line.
from __future__ import annotations

import _signal  # built into the interpreter, so an interruption cannot come before it is loaded
import os
import sys

# ---- Process -------------------------------------------------------------------------------------

if IS_COMMAND := os.path.splitext(os.path.basename(''.join(sys.argv[:1])))[0] == 'rmgradient':
    # Nothing else runs in this process. Until main() handles signals, an interruption ends it without a traceback.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    # Each of our threads processes a strip. More threads inside of small matrix products would only make them wait.
    os.environ.update(dict.fromkeys(
        ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_NUM_THREADS', 'VECLIB_MAXIMUM_THREADS'), '1'))

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import importlib.util
import io
import itertools
import logging
import math
import numbers
import re
import shlex
import shutil
import signal
import stat
import struct
import textwrap
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

if IS_COMMAND:
    # Imports create many objects and free none. Collecting garbage takes longer than correcting one picture.
    gc.disable()


def how_to_install(packages):
    """Return the command that adds packages to the environment in which this program runs."""
    python = 'python' if os.path.dirname(shutil.which('python') or '') == os.path.dirname(sys.executable) else \
        shlex.quote(sys.executable)
    folders = sys.prefix.replace('\\', '/').split('/')
    if folders[-3:-1] == ['pipx', 'venvs'] or os.path.exists(os.path.join(sys.prefix, 'pipx_metadata.json')):
        return f'pipx inject {folders[-1]} {packages}'
    if any(folder.startswith('environments-v') for folder in folders):  # of `uv run rmgradient.py`
        return f'uv run --with {packages} rmgradient.py'
    if not importlib.util.find_spec('pip'):  # as in environments of uv
        return f'uv pip install --python {python} {packages}'
    managed = os.path.join(os.path.dirname(os.__file__), 'EXTERNALLY-MANAGED')
    if sys.prefix == sys.base_prefix and os.path.exists(managed):  # the system's Python, into which pip must not write
        return f'python3 -m venv .venv && . .venv/bin/activate && pip install {packages}'
    return f'{python} -m pip install {packages}'


def why_not_loaded(error):
    """Return the message for a library that is missing or fails to load."""
    if isinstance(error, ModuleNotFoundError) and error.name and '.' not in error.name:
        names = error.name
        if names in ('imagecodecs', 'numpy', 'scipy', 'tifffile', 'threadpoolctl', 'tqdm'):
            names = 'numpy scipy "tifffile[codecs]" threadpoolctl tqdm'
        return f'{error.name} is missing; run: {how_to_install(names)}'
    kind = type(error).__name__
    return f'a library cannot be loaded ({kind}): not enough memory, or an incomplete installation'


def report_lack_of_memory(kind, error, trace):
    """Report running out of memory while libraries load in one line, not a traceback."""
    if issubclass(kind, (MemoryError, SystemError)):
        sys.stderr.write('rmgradient: error: not enough memory\n')
    else:
        sys.__excepthook__(kind, error, trace)


if IS_COMMAND:
    sys.excepthook = report_lack_of_memory

try:
    import imagecodecs
    import numpy as np
    import tifffile
except Exception as error:
    if not IS_COMMAND:
        raise
    sys.exit(f'rmgradient: error: {why_not_loaded(error)}')

__version__ = '2.0.0'
__all__ = ['AdaptiveModel', 'BackgroundModel', 'ReferenceFit', 'Chosen', 'Correction', 'Finding', 'Fit', 'Measured',
           'Picture', 'Points', 'ReferenceLevels', 'RmgradientError', 'RmgradientWarning', 'Settings', 'choose_points',
           'find_correction', 'find_misfits', 'fit_background', 'fit_with_reference', 'main', 'make_points',
           'measure_levels', 'open_picture', 'remove_gradient']
logger = logging.getLogger('rmgradient')

N_WORKERS = min(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1, 16)
SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]


class _OneBlasThread:
    """Limit BLAS to one thread, as the command's environment does.

    Our matrices are small, and we already work in threads. More threads would wait for each other, and use ten times
    the processor time. If several threads call us, the first sets the limit and the last restores it.
    """

    def __init__(self):
        self._lock, self._n_inside, self._controller, self._limits = threading.Lock(), 0, None, None

    def __enter__(self):
        if IS_COMMAND:
            return
        with self._lock:
            if not self._n_inside:
                import threadpoolctl
                self._controller = self._controller or threadpoolctl.ThreadpoolController()
                self._limits = self._controller.limit(limits=1, user_api='blas')
            self._n_inside += 1

    def __exit__(self, *_):
        if IS_COMMAND:
            return
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                self._limits.restore_original_limits()


one_blas_thread = _OneBlasThread()
_WARNINGS = threading.RLock()  # `catch_warnings` changes a state that all threads share


@contextlib.contextmanager
def no_warnings():
    """Ignore Python warnings of libraries in the block, one thread at a time."""
    with _WARNINGS, warnings.catch_warnings(action='ignore'):
        yield


def in_two_threads(work, arguments):
    """Yield the results of work on each argument, in order."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        try:
            results = pool.map(work, arguments)
        except RuntimeError as error:  # a thread cannot be started, usually for lack of memory
            raise MemoryError from error
        yield from results


@contextlib.contextmanager
def threads(progress):
    """Yield an `itertools.starmap` that works in threads, and yields results in order."""
    np.empty(min(N_WORKERS, 4) * 2**27, np.uint8)  # raise MemoryError now: later, threads would hang, and BLAS exit
    pool = concurrent.futures.ThreadPoolExecutor(N_WORKERS)

    def results(work, arguments):
        pending = collections.deque()
        for each in arguments:
            try:
                pending.append(pool.submit(work, *each))
            except RuntimeError as error:  # no more threads
                raise MemoryError from error
            if len(pending) > 2 * N_WORKERS:  # limits the memory of results that wait
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield lambda work, arguments: progress(results(work, arguments), len(arguments), work.__name__)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ignore(*_):
    """Ignore a signal. With SIG_IGN, Python would report an error for a signal that has already arrived."""


def interrupt(signal_number, _):
    """Raise SystemExit for the first signal, so that everything is cleaned up. Ignore further signals."""
    for each in SIGNALS:
        signal.signal(each, ignore)
    sys.exit(128 + signal_number)


@contextlib.contextmanager
def signals_handled(handler):
    """Handle the signals that would end the program. Python allows this only in the main thread."""
    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, handler) for number in SIGNALS
               if signal.getsignal(number) not in (signal.SIG_IGN, None)}  # ignored, or not Python's
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---- Errors and settings -------------------------------------------------------------------------

SIGMA = 8.0  # pixels; wide enough to average the noise, narrow enough to fit between stars
ROWS = 100  # rows read, corrected and written together
SKIES = 'gray', 'color', 'darkest'
METHODS = 'subtract', 'stretch', 'divide'


class RmgradientError(ValueError):
    """A mistake that the user can correct: in the picture, the points, the options or the files."""


class Damage(RmgradientError):
    """A file contradicts itself."""


class Unusable(RmgradientError):
    """A place cannot be measured."""


class RmgradientWarning(UserWarning):
    """Warning about a picture or its background, see `Finding`."""


class Finding(NamedTuple):
    """A remark or a warning about a picture. docs/messages.rst explains each kind."""

    kind: str  # name of the kind, for example 'misfit'
    text: str  # what is wrong, in one line
    advice: str = ''  # what to do
    severity: str = 'warning'  # or 'remark'
    places: tuple = ()  # points (x, y) or areas (left, top, right, bottom), pixels
    numbers: Mapping[str, Any] = MappingProxyType({})  # by name; 'noises' is the size in noises of a pixel or a level

    def __str__(self) -> str:
        return f'{self.text}: {self.advice}' if self.advice else self.text

    def __repr__(self) -> str:
        return f'<Finding {self.kind} ({self.severity}): {self}>'


class NamedError(RmgradientError):
    """An error whose message begins with a file name."""


def printable(text):
    """Escape unprintable characters, as in file names."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))


@contextlib.contextmanager
def about(name):
    """Prefix errors raised in the block with a file name, unless they have one. An empty name adds nothing."""
    try:
        yield
    except NamedError:
        raise
    except (RmgradientError, OSError) as error:
        if not name:
            raise
        raise NamedError(f'{name}: {getattr(error, "strerror", None) or error}') from error


def in_words(values):
    """Return numbers, one for each channel, as text."""
    return ', '.join(f'{value:.0f}' if 1e4 <= abs(value) <= 1e12 else f'{value:.5g}' for value in values)


def rounded(value):
    """Return the absolute value as text: two digits below 100, a whole number from 100 on."""
    value = abs(float(value))
    return f'{value:.0f}' if 100 <= value < 1e12 else f'{value:.2g}'


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of a correction.

    Raises RmgradientError for values outside their range.
    """
    # A new option is added here, in `build_parser`, and in the step that uses it.

    sigma: float = SIGMA  # blur at the points, pixels
    smooth: float | str = 'auto'  # 'auto': the adaptive model; a number: the classic one, see `fit_background`
    sky: str | float | Sequence[float] | None = None  # level of the corrected sky, physical, see `find_correction`
    method: str = 'subtract'  # or 'stretch' or 'divide', see `Correction`
    dither: bool = False  # add noise of one count before rounding to integers
    rows: int = ROWS  # processed together; memory is proportional
    white: float | None = None  # value of white, physical, for 'stretch'; None: the largest integer, 1.0 for floats
    auto: int | None = None  # cells along the longer side; 0: 15, or 24 with a reference; None: no automatic points
    compress: int = 0  # deflate level of the written files; 0: none

    def __post_init__(self):
        if not (isinstance(self.sigma, numbers.Real) and 0.1 <= self.sigma <= 10000):
            raise RmgradientError(f'a blur of sigma {self.sigma!r} is not a number of pixels from 0.1 to 10000')
        is_word = isinstance(self.smooth, str) and self.smooth == 'auto'
        if not is_word and not (isinstance(self.smooth, numbers.Real) and 0 <= self.smooth <= 1e308):
            raise RmgradientError(f"smoothness {self.smooth!r} is not 'auto' or a number from 0")
        if not (isinstance(self.rows, numbers.Integral) and self.rows > 0):
            raise RmgradientError(f'rows are {self.rows!r}, not a whole number above 0')
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise RmgradientError(f'method {self.method!r} is not one of {", ".join(METHODS)}')
        if not isinstance(self.dither, (bool, np.bool_)):
            raise RmgradientError(f'dither is {self.dither!r}, not True or False')
        if not (isinstance(self.compress, numbers.Integral) and 0 <= self.compress <= 9):
            raise RmgradientError(f'compress is {self.compress!r}, not a level from 0 to 9')
        if self.auto is not None and not (isinstance(self.auto, numbers.Integral) and self.auto >= 0):
            raise RmgradientError(f'auto is {self.auto!r}, not a number of cells along the longer side')
        if self.white is not None and not (isinstance(self.white, numbers.Real) and 0 < self.white <= 1e308):
            raise RmgradientError(f'white is {self.white!r}, not a number above 0')
        if isinstance(self.sky, str) and self.sky in SKIES or self.sky is None:
            return
        try:
            level = np.asarray(self.sky)
            is_number = level.ndim < 2 and level.dtype.kind in 'iuf' and np.isfinite(level).all() and level.size
        except (TypeError, ValueError, OverflowError):
            is_number = False
        if isinstance(self.sky, str) or not is_number:
            raise RmgradientError(f'the level of the sky, {self.sky!r}, is neither a number, nor one for each channel, '
                                  f'nor one of {", ".join(SKIES)}')

    @property
    def is_classic(self):
        """Whether the result is that of rmgradient of 2019, which does not know borders without data."""
        return not self.is_adaptive and (self.sky is None or isinstance(self.sky, str) and self.sky == 'darkest')

    @property
    def is_adaptive(self):
        """Whether the model is adaptive, and its levels are measured without stars."""
        return isinstance(self.smooth, str)


# ---- Points --------------------------------------------------------------------------------------

MOST_POINTS = 5000  # of a model: time grows with the third power of this, memory with the second
SEPARATORS = r'[\s,;()\[\]{}]+'  # between coordinates


class Points(NamedTuple):
    """Points of the background, measured ones and those on isolines."""

    x: np.ndarray  # (n_points,) int: column; the top left pixel is (0, 0)
    y: np.ndarray  # (n_points,) int: row
    leader: np.ndarray  # (n_points,) int: index of the point whose level it takes: itself, or the first of its isoline
    sources: tuple = ()  # (n_points,) str: where each was read, for messages; empty if unknown
    least_shape: float = 0.0  # smallest shape of the adaptive model through them, pixels: see `choose_points`
    is_chosen: bool = False  # some points were chosen automatically

    def __repr__(self) -> str:
        n_on_isolines = np.count_nonzero(self.on_isoline)
        return f'<Points: {len(self.x) - n_on_isolines} measured, {n_on_isolines} on isolines>'

    @property
    def on_isoline(self) -> np.ndarray:
        """(n_points,) bool ndarray: True for points that take the level of another point."""
        return self.leader != np.arange(len(self.leader))

    @property
    def centers(self) -> np.ndarray:
        """(n_points, 2) float64 ndarray: x and y, pixels."""
        return np.stack([self.x, self.y], axis=1).astype(float)

    @property
    def pairs(self) -> np.ndarray:
        """(n_points, 2) float64 ndarray: x and y, pixels, negative (also -0.0) on isolines."""
        return np.copysign(self.centers, np.where(self.on_isoline, -1.0, 1.0)[:, None])

    def subset(self, kept: np.ndarray) -> Points:
        """Return the points where kept, (n_points,) bool, is True. The first one of each isoline becomes its leader."""
        _, first, group = np.unique(self.leader[kept], return_index=True, return_inverse=True)
        sources = tuple(itertools.compress(self.sources, kept))
        return self._replace(x=self.x[kept], y=self.y[kept], leader=first[group], sources=sources)

    def describe(self, indices: Sequence[int]) -> str:
        """Return the coordinates of some points as text: the first five, and how many more."""
        sources = [source and f' in {source}' for source in self.sources] or [''] * len(self.x)
        places = ', '.join(f'({self.x[i]}, {self.y[i]}){sources[i]}' for i in indices[:5])
        more = f' and {len(indices) - 5} more' if len(indices) > 5 else ''
        return f'{"points" if len(indices) > 1 else "point"} {places}{more}'


def parse_coordinates(words):
    """Return the (n_points, 2) coordinates in a list of words. Decimals are rounded, and -0 keeps its sign."""
    values = []
    for word in re.split(SEPARATORS, ' '.join(words).strip(' ,;()[]{}')):
        if not re.fullmatch(r'[+-]?[0-9]{1,9}(\.[0-9]*)?', word, re.ASCII):
            raise RmgradientError(f'coordinate {word[:40]!r} is not a number of pixels')
        values.append(math.copysign(round(abs(float(word))), -1 if word[0] == '-' else 1))
    if len(values) % 2:
        raise RmgradientError(f'the number of coordinates is odd: the last one, {values[-1]:.0f}, has no partner')
    return np.array(values).reshape(-1, 2)


def split_words(line):
    """Return the words of a line of a points file before a comment."""
    return re.split(SEPARATORS, line.split('#')[0].strip(' \t\r\n,;()[]{}'))


def count_numbers(line):
    """Return how many numbers a line has, 0 if it also has words."""
    words = split_words(line)
    return len(words) if all(re.fullmatch(r'[+-]?[\d.]+', word) for word in words) else 0


def parse_points_file(lines):
    """Return the pairs in lines of a points file, and the line number of each.

    Each line has a pair, or all lines have a single number. Text after a pair or after # is a comment.
    """
    numbered = [(i, split_words(line)[:2]) for i, line in enumerate(lines, 1)]
    numbered = [(i, words) for i, words in numbered if words[0]]
    if all(len(words) == 1 for _, words in numbered):
        numbered = [(i, [*x, *y]) for (i, x), (_, y) in itertools.zip_longest(
            numbered[::2], numbered[1::2], fillvalue=(0, []))]
    pairs = []
    for i, words in numbered:
        try:
            pairs.extend(parse_coordinates(words))
        except RmgradientError as error:
            raise RmgradientError(f'line {i}: {error}') from error
    return np.array(pairs).reshape(-1, 2), [i for i, _ in numbered]


def format_points_file(points):
    """Return the lines of a points file, without its header. `parse_points_file` reads them."""
    return [f'{x:.0f} {abs(y):.0f}' for x, y in points.pairs]


def make_points(pairs: ArrayLike, sources: Sequence[str] = (), least: int = 3) -> Points:
    """Make Points from coordinates, negative ones on isolines.

    Parameters
    ----------
    pairs : (n_points, 2) array_like
        Coordinates x, y in pixels. Decimals are rounded. A minus sign on either (also -0.0) puts the point on the
        isoline of the last point without one.
    sources : sequence of str
        Where each was read, for messages: one for each point, or none.
    least : int
        Smallest number of points: three for a surface, one together with automatic points.

    Raises
    ------
    RmgradientError
        If the pairs are not numbers, an isoline has no first point, a place is given twice, or there are fewer than
        `least` or more than 5000 points.
    """
    try:
        pairs = np.asarray(pairs)
        if pairs.dtype.kind == 'c':
            raise TypeError
        pairs = pairs.astype(float)
    except (TypeError, ValueError, OverflowError) as error:
        raise RmgradientError('points are not pairs of numbers') from error
    if pairs.size == 0:
        raise RmgradientError(f'no points; give at least {"three" if least > 1 else "one"}')
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise RmgradientError(f'points of shape {pairs.shape} are not pairs of coordinates')
    if len(pairs) > MOST_POINTS:
        raise RmgradientError(f'{len(pairs)} points are too many, they would take minutes and gigabytes; '
                              f'give at most {MOST_POINTS}')
    if not (np.abs(pairs) < 2**31).all():
        raise RmgradientError('points are not all numbers of pixels')
    if np.signbit(pairs[0]).any():
        raise RmgradientError('the first point has a minus sign: an isoline begins with a point without one')
    if len(sources) not in (0, len(pairs)):
        raise RmgradientError(f'{len(sources)} sources for {len(pairs)} points; give one for each, or none')
    points, seen = unchecked_points(pairs, sources), {}
    for i, place in enumerate(zip(points.x.tolist(), points.y.tolist())):
        if (first := seen.setdefault(place, i)) != i:
            raise RmgradientError(f'{points.describe([i])}, number {i + 1}, repeats number {first + 1}: '
                                  'remove one of them')
    if len(seen) < least:
        raise RmgradientError(f'too few points, {len(seen)}; give at least three')
    return points


def as_points(points: ArrayLike | Points, least: int = 3) -> Points:
    """Return pairs or Points as valid Points, see `make_points`."""
    if not isinstance(points, Points):
        return make_points(points, least=least)
    x, y, leader = (np.asarray(each) for each in points[:3])
    if not (x.ndim == 1 and len(x) and x.shape == y.shape == leader.shape
            and all(each.dtype.kind in 'iu' and each.min() >= 0 for each in (x, y, leader)) and (leader < len(x)).all()
            and (leader[leader] == leader).all() and len(points.sources) in (0, len(x))
            and max(x.max(), y.max()) < 2**31 and isinstance(points.least_shape, numbers.Real)
            and 0 <= points.least_shape < 1e9 and len(set(zip(x.tolist(), y.tolist()))) == len(x)):
        raise RmgradientError('invalid Points; use make_points or choose_points')
    return points._replace(x=x, y=y, leader=leader)


def unchecked_points(pairs, sources=()):
    """Return the Points of pairs as `make_points`, without its checks."""
    pairs = np.asarray(pairs, float).reshape(-1, 2)
    on_isoline = np.signbit(pairs).any(axis=1)
    leader = np.maximum.accumulate(np.where(on_isoline, 0, np.arange(len(pairs))))
    return Points(*np.rint(np.abs(pairs)).astype(int).T, leader, tuple(sources))


def remove_pair(pairs, i):
    """Return pairs without one. If it was measured, the next point on its isoline is measured instead."""
    others = np.delete(pairs, i, axis=0)
    if i < len(others) and not np.signbit(pairs[i]).any():
        others[i] = np.abs(others[i])
    return others


def check_points(points, height, width, radius):
    """Raise RmgradientError if a point is outside, or a measured point is within radius of a border."""
    x, y = points.x, points.y
    if 2 * radius >= min(height, width):
        raise RmgradientError(f'the blur reaches {radius} pixels, too far in {width} x {height} pixels; use '
                              'a smaller sigma')
    if len(outside := np.flatnonzero((x >= width) | (y >= height))):
        swapped = ': are x and y swapped?' if (x < height).all() and (y < width).all() else ''
        verb = 'are' if len(outside) > 1 else 'is'
        raise RmgradientError(f'{points.describe(outside)} {verb} outside of the picture, '
                              f'{width} x {height} pixels{swapped}')
    from_border = np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y))
    if len(near := np.flatnonzero((from_border < radius) & ~points.on_isoline)):
        verb, them = ('are', 'them') if len(near) > 1 else ('is', 'it')
        raise RmgradientError(f'{points.describe(near)} {verb} within {radius} pixels of the border; '
                              f'use a smaller sigma or move {them}')


# ---- Pictures ------------------------------------------------------------------------------------

TINY = np.finfo(float).tiny  # added to divisors that may be zero
MOSAIC = 4.0  # standard errors: if medians of the sublattices differ by more, the picture has raw colors
LONG_RUN = 32  # pixels: so many zeros side by side in a row have no data; fewer, inside of the frame, are sky


class Picture:
    """A picture whose rows are read when they are needed: an array or an open file.

    `picture[top:bottom, left:right]` reads a window of the color channels, and `numpy.asarray(picture)` all pixels.
    `read` also returns extra samples (alpha). All methods may be called from several threads.

    Data units are those of stored values. The physical value is scale * stored value + zero. For most files, both are
    the same.
    """

    path: str = ''  # of the file, for messages; empty for arrays
    shape: tuple[int, int, int]  # height, width and number of color channels
    n_samples: int  # color channels plus extra samples
    dtype: np.dtype  # in native byte order
    blank: float | None = None  # stored value of pixels without data; windows have NaN there, and `read` this value
    alpha: int | None = None  # index, from the end, of the alpha sample: 0 is transparent
    mask: Picture | None = None  # pixels that are not 0 here are not measured
    scale: float = 1.0  # see above
    zero: float = 0.0  # see above
    bottom_up: bool = False  # the first row is displayed at the bottom
    has_wcs: bool = False  # its header has coordinates in the sky, see `wcs`
    starmap: Callable = staticmethod(itertools.starmap)  # processes groups of rows, for example in threads

    def __repr__(self) -> str:
        height, width, n_channels = self.shape
        return f'<Picture {self.path or "in memory"}: {width} x {height} pixels, {n_channels} channels, {self.dtype}>'

    def read(self, start: int, stop: int, left: int = 0, right: int | None = None) -> np.ndarray:
        """Return rows start to stop - 1 of columns left to right - 1, by default all.

        The result is a new writable (n_rows, n_columns, n_samples) ndarray in native byte order.
        """
        raise NotImplementedError

    def __getitem__(self, window: Any) -> np.ndarray:
        window = window if isinstance(window, tuple) else (window,)
        rows, columns, *channels = (*window, *[slice(None)] * (2 - len(window)))
        (top, bottom, rows), (left, right, columns) = map(_bounds, (rows, columns), self.shape)
        if top >= bottom or left >= right:
            color = np.empty((max(0, bottom - top), max(0, right - left), self.shape[2]), self.dtype)
        else:
            color = self.read(top, bottom, left, right)[..., :self.shape[2]]
        color = color if self.blank is None else np.where(color == self.blank, np.nan, color)
        # Columns first: an integer index removes its axis.
        color = color[:, columns][rows]
        return color[(..., *channels)] if channels else color

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def usable(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the color channels of a window, and which of its pixels can be measured, (n_rows, n_columns) bool.

        Pixels can be measured if they are finite, not blank, not transparent, not masked, and not without data (zeros
        around a registered stack). Rows and columns are slices with start and stop. Blank values stay numbers.
        """
        samples = self.read(rows.start, rows.stop, columns.start, columns.stop)
        color = samples[..., :self.shape[2]]
        usable = ~self.untouched(samples, rows, columns)
        if color.dtype.kind == 'f':
            usable &= np.isfinite(color).all(axis=2)
        if self.blank is not None:
            usable &= (color != self.blank).all(axis=2)
        if self.mask is not None:
            usable &= ~self.is_masked(rows, columns)
        return color, usable

    def untouched(self, samples, rows, columns):
        """Return which pixels of a window are transparent or without data, (n_rows, n_columns) bool.

        The samples are those that `read` returns for the window.
        """
        n_channels = self.shape[2]
        color = samples[..., :n_channels]
        if color.shape[1] == self.shape[1]:
            untouched = no_data(color, self._ends_empty(rows, color))
        else:
            untouched = is_empty(color)
            for i in np.flatnonzero(untouched.any(axis=1)):  # whether there is data depends on the whole row
                row = slice(rows.start + i, rows.start + i + 1)
                whole = self.read(row.start, row.stop)[..., :n_channels]
                untouched[i] = no_data(whole, self._ends_empty(row, whole))[0, columns]
        if self.alpha is not None:
            untouched |= samples[..., self.alpha] == 0
        return untouched

    def _ends_empty(self, rows, color):
        """Return whether the first and last pixel of each row are empty, (n_rows + 2, 2) bool.

        The row above and the row below are included. These are only read if they can change the result.
        """
        (height, width, n_channels), ends = self.shape, is_empty(color[:, [0, -1]])
        around = np.zeros((2, 2), bool)
        for i, y, ends_there in ((0, rows.start - 1, ends[0]), (1, rows.stop, ends[-1])):
            for j, x in enumerate((0, width - 1)):
                if ends_there[j] and 0 <= y < height:
                    around[i, j] = is_empty(self.read(y, y + 1, x, x + 1)[..., :n_channels])[0, 0]
        return np.concatenate([around[:1], ends, around[1:]])

    def is_masked(self, rows, columns):
        """Return which pixels of a window are masked, (n_rows, n_columns) bool."""
        values = self.mask.read(rows.start, rows.stop, columns.start, columns.stop)
        return (self.mask.physical(values[..., :self.mask.shape[2]]) != 0).any(axis=2)

    def wcs(self):
        """Return the astropy.wcs.WCS of its pixels, counted from 0. Raise RmgradientError if there is none."""
        raise NotRegistered('has no coordinates in the sky (WCS)')

    def physical(self, values):
        """Return the physical values of stored values (BSCALE and BZERO of FITS)."""
        return values if (self.scale, self.zero) == (1, 0) else self.scale * np.asarray(values) + self.zero

    def each_strip(self, work, rows=ROWS):
        """Yield work(start, stop) for each group of rows, in order."""
        return self.starmap(work, row_groups(self.shape[0], rows))

    @functools.cached_property
    def tiles(self) -> Tiles:
        """Medians of its tiles, sampled once."""
        return sample_tiles(self)

    @functools.cached_property
    def stars(self) -> np.ndarray:
        """Coordinates of its brightest stars, (n_stars, 2), pixels."""
        return find_stars(self)

    @functools.cached_property
    def stars_of_middle(self) -> np.ndarray:
        """Coordinates of the brightest stars in the middle, where each pixel is examined."""
        return find_stars(self, *(slice(max(0, n // 2 - BINNED // 2), min(n, n // 2 + BINNED // 2))
                                  for n in self.shape[:2]))

    @functools.cached_property
    def flipped(self) -> Picture:
        """The same picture upside down."""
        return Flipped(self)

    @functools.cached_property
    def masked_share(self) -> float:
        """The fraction of its pixels that is masked."""
        def masking(start, stop):
            return np.count_nonzero(self.is_masked(slice(start, stop), slice(0, self.shape[1])))

        return sum(self.each_strip(masking)) / math.prod(self.shape[:2])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the file, if there is one."""


def _bounds(index, n):
    """Return the range of pixels that an index of an axis needs, and the index inside of this range."""
    if isinstance(index, numbers.Integral):
        if not -n <= index < n:
            raise IndexError(f'row or column {index} of {n}')
        return index % n, index % n + 1, 0
    if not isinstance(index, slice):
        raise RmgradientError(f'a Picture takes integers and slices of rows and columns, not {index!r}')
    start, stop, step = index.indices(n)
    if step < 0:
        raise RmgradientError('a Picture takes no slices backwards; take [::-1] of what it returns')
    return start, max(start, stop), slice(None, None, step)


class Flipped(Picture):
    """Another picture upside down: FITS counts rows from the bottom, and TIFF from the top."""

    def __init__(self, picture):
        self._picture, self.path, self.shape, self.n_samples = picture, picture.path, picture.shape, picture.n_samples
        for name in ('dtype', 'scale', 'zero', 'blank', 'alpha'):
            setattr(self, name, getattr(picture, name))
        self.mask = picture.mask and picture.mask.flipped

    @property
    def starmap(self):
        """The starmap of the other picture, which changes during a run."""
        return self._picture.starmap

    def read(self, start, stop, left=0, right=None):
        height = self.shape[0]
        return self._picture.read(height - stop, height - start, left, right)[::-1]


class ArrayPicture(Picture):
    """A (height, width) or (height, width, n_channels) array. All channels are colors."""

    def __init__(self, array):
        self._array, self.has_channels = array if array.ndim == 3 else array[..., None], array.ndim == 3
        self.shape, self.n_samples = self._array.shape, self._array.shape[2]
        self.dtype = array.dtype.newbyteorder('=')

    def read(self, start, stop, left=0, right=None):
        return np.array(self._array[start:stop, left:right], self.dtype)


def is_masked_array(image):
    """Whether an image is a numpy.ma array. numpy loads that module when it is used, in 10 ms."""
    return 'numpy.ma' in sys.modules and isinstance(image, np.ma.MaskedArray)


def as_picture(image: ArrayLike | Picture, mask: ArrayLike | None = None) -> Picture:
    """Return a picture or an array as a Picture.

    The mask is a (height, width) array, True where nothing is measured. The mask of a numpy.ma array or of astropy's
    CCDData is added to it. Raises RmgradientError if the array is not a picture.
    """
    own = None
    if is_masked_array(image):
        image, own = image.data, np.ma.getmaskarray(image)
    elif hasattr(image, 'uncertainty') and hasattr(image, 'mask'):  # NDData
        image, own = image.data, image.mask
    if isinstance(image, Picture):
        picture = image
    else:
        if getattr(image, 'unit', None) is not None:
            raise RmgradientError('an image with a unit would lose the unit; pass only the values')
        try:
            array = np.asarray(image)
        except ValueError as error:
            raise RmgradientError('rows of different lengths are not a picture') from error
        if array.dtype.kind not in 'uif' or array.ndim not in (2, 3) or not array.size:
            raise RmgradientError(f'an array of {array.dtype} of shape {array.shape} is not a picture; '
                                  'open_picture opens a file')
        if array.ndim == 3 and array.shape[0] <= 4 < array.shape[2]:
            raise RmgradientError(f'an array of shape {array.shape} has its channels first; '
                                  'pass np.moveaxis(image, 0, -1)')
        picture = ArrayPicture(array)
    if isinstance(mask, Picture):
        mask = mask.physical(mask[0:mask.shape[0], 0:mask.shape[1]]) != 0
    try:
        masks = [np.asarray(each) for each in (own, mask) if each is not None and each is not np.ma.nomask]
    except ValueError as error:
        raise RmgradientError('rows of different lengths are not a mask') from error
    for i, each in enumerate(masks):
        if each.shape[:2] != picture.shape[:2] or each.ndim not in (2, 3):
            raise RmgradientError(f'a mask of shape {each.shape} does not suit a picture of {picture.shape[0]} x '
                                  f'{picture.shape[1]} pixels')
        masks[i] = each.reshape(*each.shape[:2], -1).astype(bool).any(axis=2)
    if masks:
        picture = copy.copy(picture)  # so that the picture of the caller gets no mask
        for name, each in vars(Picture).items():
            if isinstance(each, functools.cached_property):  # computed without the mask
                vars(picture).pop(name, None)
        picture.mask = ArrayPicture(np.any(masks, axis=0))
    return picture


def medians(values):
    """Return the median of finite values along the last axis, in a fifth of the time of numpy.median."""
    n = values.shape[-1]
    parts = np.partition(values, n // 2)  # for two places at once, it has no vector instructions
    return parts[..., n // 2] if n % 2 else (parts[..., :n // 2].max(axis=-1) + parts[..., n // 2]) / 2


def robust_std(errors):
    """Return the standard deviation of each channel, estimated by the median absolute error."""
    median = medians(np.moveaxis(np.abs(errors), 0, -1))
    return 1.4826 * np.where(np.isnan(errors).any(axis=0), np.nan, median) + TINY  # 1.4826 for normal errors


def is_color_mosaic(picture):
    """Whether the first channel has raw colors of a color filter array: its four sublattices differ.

    Medians of the sublattices are compared in 8 x 8 blocks of 32 x 32 pixels, in units of their standard errors. In
    gray pictures they differ by 2.
    """
    height, width, _ = picture.shape
    differences, side = [], min(32, height // 2 * 2, width // 2 * 2)
    for y in np.linspace(0, height - side, 8).astype(int) if side else ():
        values, usable = picture.usable(slice(y, y + side), slice(0, width))
        values = np.where(usable, values[..., 0], np.nan)
        for x in np.linspace(0, width - side, 8).astype(int):
            block = values[:, x:x + side]
            lattices = [block[i::2, j::2].ravel() for i in range(2) for j in range(2)]
            lattices = [lattice[np.isfinite(lattice)] for lattice in lattices]
            if min(map(len, lattices)) >= side * side / 8:
                medians = [np.median(lattice) for lattice in lattices]
                scatter = np.median([robust_std(lattice - np.median(lattice)) for lattice in lattices])
                error = max(1.2533 * scatter / math.sqrt(side * side / 4), 0.3 if picture.dtype.kind in 'ui' else TINY)
                differences.append(np.ptp(medians) / error)
    return bool(differences) and np.median(differences) > MOSAIC


def row_groups(height, rows=ROWS):
    """Return (start, stop) of each group of rows."""
    return [(start, min(start + rows, height)) for start in range(0, height, rows)]


def no_data(rows, ends_empty):
    """Find pixels without data in whole rows, (n_rows, width, n_channels), for example around a registered stack.

    Returns (n_rows, width) bool. Pixels without data are 0 or not finite in all channels. They belong to a run along
    their row that touches the left or the right border or has `LONG_RUN` pixels. A single black pixel at the border is
    data if the pixels above and below are not black: see `Picture._ends_empty`, (n_rows + 2, 2) bool.
    """
    found = np.zeros(rows.shape[:2], bool)
    # Every sixteenth pixel is tested. A long run has two of these in sequence. Most rows need no more work.
    every = is_empty(rows[:, ::LONG_RUN // 2])
    some = ends_empty[1:-1].any(axis=1) | (every[:, 1:] & every[:, :-1]).any(axis=1)
    if some.any():
        empty = np.pad(is_empty(rows[some]), ((0, 0), (1, 1)))
        height, width = empty.shape
        edges = np.flatnonzero(np.diff(empty.ravel().astype(np.int8)))  # pixel before each run, and its last pixel
        start, stop = edges[::2], edges[1::2]
        touches = np.stack([start % width == 0, stop % width == width - 2], axis=1)
        row = np.flatnonzero(some)[start // width]
        single = (stop - start == 1) & ~(touches & (ends_empty[row] | ends_empty[row + 2])).any(axis=1)
        long = (stop - start >= LONG_RUN) | touches.any(axis=1) & ~single
        steps = np.zeros(height * width + 1, np.int8)
        steps[start[long] + 1], steps[stop[long] + 1] = 1, -1
        found[some] = np.cumsum(steps[:-1], dtype=np.int8).reshape(height, width)[:, 1:-1] > 0
    return found


def is_empty(rows):
    """Return where pixels are 0 or not finite in all channels."""
    return (rows == 0 if rows.dtype.kind in 'ui' else (rows == 0) | ~np.isfinite(rows)).all(axis=2)


# ---- Tiles -----------------------------------------------------------------------------------------

TILES, SAMPLES = 60, 16  # tiles along the longer side of a picture; samples along a side of a tile
CALM_TILES = 0.5  # fraction of the tiles that give the noise of a pixel: other tiles have structure


class Tiles(NamedTuple):
    """Medians of the tiles of a picture. The outermost tiles touch the borders."""

    medians: np.ndarray  # (n_down, n_across, n_channels), data units; NaN unless more than half can be measured
    x: np.ndarray  # (n_across,): centers, pixels
    y: np.ndarray  # (n_down,)
    side: int  # pixels
    noise: np.ndarray  # (n_channels,): standard deviation of a pixel in the calmer tiles, data units


def sample_tiles(picture):
    """Return the Tiles of a picture. Memory: at most 960 x 960 samples."""
    height, width, n_channels = picture.shape
    side = min(max(8, round(max(height, width) / TILES)), height, width)
    tops, lefts = (np.round(np.linspace(0, n - side, max(1, n // side))).astype(int) for n in (height, width))
    inside = np.unique(np.round(np.linspace(0, side - 1, min(side, SAMPLES))).astype(int))
    columns = (lefts[:, None] + inside).ravel()
    # Reading four neighboring rows at once is faster than single rows: 240 windows instead of 960.
    n_together = min(4, len(inside))
    rows = np.unique(np.round(np.linspace(0, side - n_together, len(inside) // n_together)).astype(int))

    # Small tiles are read many rows at once, which takes half the time for 600 x 400 pixels.
    n_tiles = ROWS // side if side <= SAMPLES else 1
    rows = (rows[:, None] + np.arange(n_together)).ravel()

    def sampling(first):
        here = tops[first:first + n_tiles]
        if n_tiles > 1:
            windows, taken = [(here[0], here[-1] + side)], (here[:, None] - here[0] + rows).ravel()
        else:
            windows, taken = [(row, row + n_together) for row in here[0] + rows[::n_together]], slice(None)
        parts = [picture.usable(slice(int(start), int(stop)), slice(0, width)) for start, stop in windows]
        values, usable = (np.concatenate([part[i][:, columns] for part in parts])[taken] for i in range(2))
        n = len(here) * len(lefts)
        values = values.reshape(len(here), len(rows), len(lefts), -1, n_channels).transpose(0, 2, 4, 1, 3)
        usable = usable.reshape(len(here), len(rows), len(lefts), -1).transpose(0, 2, 1, 3)
        found = quartiles(np.ascontiguousarray(values).reshape(n, n_channels, -1), usable.reshape(n, -1))
        return found.reshape(len(here), len(lefts), 3, n_channels)

    with np.errstate(invalid='ignore', over='ignore'):
        found = np.concatenate(list(picture.starmap(sampling, [(i,) for i in range(0, len(tops), n_tiles)])))
    lower, medians, upper = np.moveaxis(found, 2, 0)
    deviation = ((upper - lower) / 1.349).reshape(-1, n_channels)  # of normal noise
    deviation = np.sort(deviation[np.isfinite(deviation).all(axis=1)], axis=0)
    # Averaged over tiles, since quartiles of integers are integers.
    calm = deviation[:math.ceil(CALM_TILES * len(deviation))]
    noise = calm.mean(axis=0) if len(calm) else np.zeros(n_channels)
    middle = (side - 1) / 2
    return Tiles(medians, lefts + middle, tops + middle, side, noise)


def quartiles(values, usable):
    """Return lower quartile, median and upper quartile, (n_tiles, 3, n_channels), of (n_tiles, n_channels, n) values.

    Only usable values are used, (n_tiles, n) bool. Unless more than half are usable, the result is NaN.
    """
    n = values.shape[2]
    ranks = [n // 4, n // 2, n - 1 - n // 4]
    # To sort uses vector instructions: a tenth of the time of numpy.partition for three ranks.
    found = np.sort(values, axis=2)[..., ranks].astype(float).transpose(0, 2, 1)
    for i in np.flatnonzero(~usable.all(axis=1)):
        some = values[i][:, usable[i]]
        found[i] = np.quantile(some, (0.25, 0.5, 0.75), axis=1) if some.shape[1] > n / 2 else np.nan
    return found


# ---- Levels --------------------------------------------------------------------------------------

CLIP = 4.0  # standard deviations from the median of a window: with 2.5, errors on drawn skies are 8 % larger
LEAST_SHARE = 0.5  # fraction of the weight of a window that must be on usable pixels
BLOCKS = 7  # blocks along a side of a window: with 3, the noise on a nebula is three times too large
CALM = 0.25  # quantile of the excess scatter of blocks: with the median, structure would count as noise


class Chosen(NamedTuple):
    """How points were chosen automatically."""

    n_given: int  # points of the user, which come first
    n_places: int  # quiet places to choose from
    agree: bool  # the sky among these agrees on one smooth surface; always True with a reference


class Measured(NamedTuple):
    """Levels of the background at points, and their noise."""

    points: Points
    levels: np.ndarray  # (n_points, n_channels), data units; points on an isoline have the level of its leader
    noise: np.ndarray  # (n_points, n_channels): standard errors of the levels, data units
    chosen: Chosen | None = None  # None if all points were given
    reference: ReferenceLevels | None = None  # levels of a reference at the same points

    def __repr__(self) -> str:
        levels, noise = (f'{each.min():.5g} to {each.max():.5g}' for each in (self.levels, self.noise))
        return f'<Measured: {self.points!r}, {self.levels.shape[1]} channels, levels {levels}, noise {noise}>'

    def subset(self, kept):
        """Return the levels of the points where kept, (n_points,) bool, is True."""
        reference = self.reference and self.reference.subset(kept)
        return self._replace(points=self.points.subset(kept), levels=self.levels[kept], noise=self.noise[kept],
                             reference=reference)


class ReferenceLevels(NamedTuple):
    """Levels of a reference at points, in its own units. It has the channels of the picture, or one."""

    levels: np.ndarray  # (n_points, n_channels), without stars
    plain: np.ndarray  # the same with stars
    ours: np.ndarray  # (n_points, n_channels): levels of the picture with stars, data units
    zero: np.ndarray  # (n_channels,): level of the reference without light; does not depend on the points
    is_same_type: bool = False  # the reference has the type of the picture
    n_lost: int = 0  # points of the user that cannot be measured on the reference
    lost: np.ndarray = np.empty((0, 2))  # (n, 2): all places that cannot be measured on it, x and y
    where: str = ''  # position of the reference on the picture, as text

    def __repr__(self) -> str:
        return f'<ReferenceLevels: {len(self.levels)} points, {self.n_lost} lost{self.where and ", " + self.where}>'

    def subset(self, kept):
        """Return the levels of some of the points, (n_points,) bool."""
        return self._replace(levels=self.levels[kept], plain=self.plain[kept], ours=self.ours[kept])


def without_trend(values, terms):
    """Return (n_points, n) values minus their projection on orthonormal terms."""
    return values - terms @ (terms.T @ values)


def blur_kernel(sigma):
    """Return the (2 * radius + 1,) weights of a Gaussian, cut off at radius = ceil(3 sigma). Their sum is 1."""
    radius = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return kernel / kernel.sum()


class Window(NamedTuple):
    """Level and noise of a window around a point, (n_channels,) each, in data units."""

    level: np.ndarray
    noise: np.ndarray  # standard error of the level for independent pixels
    by_blocks: np.ndarray  # standard error estimated from blocks of pixels; 0 if unknown


def measure_levels(image: ArrayLike | Picture, points: ArrayLike | Points, sigma: float = SIGMA,
                   robust: bool = True) -> Measured:
    """Measure the blurred color at each point.

    Parameters
    ----------
    image : (height, width, n_channels) or (height, width) array_like, also with a mask, or a Picture
        Only the windows around the points are read, from top to bottom.
    points : Points, or (n_points, 2) array_like
        See `make_points`.
    sigma : float
        Standard deviation of the Gaussian blur in pixels. The Gaussian is cut off at ceil(3 sigma).
    robust : bool
        True: leave out values more than four standard deviations from the median of the window, for example stars.
        False: the plain blur of the classic model.

    Returns
    -------
    Measured
        Weighted means of the usable pixels around each point, and their standard errors.

    Raises
    ------
    RmgradientError
        If sigma is out of range or too large for the picture. If a point is outside. If a measured point is masked,
        within ceil(3 sigma) of the border, or has less than half of its weight on usable pixels.
    """
    points = as_points(points)
    windows = windows_of(as_picture(image), points, Settings(sigma=sigma).sigma, robust)
    for i, window in windows.items():
        if isinstance(window, Unusable):
            raise RmgradientError(f'{points.describe([i])} {window}') from window
    return measured_from(points, windows)


def windows_of(picture, points, sigma, robust):
    """Return {index: Window} of the measured points, from top to bottom. The Window can be an Unusable instead."""
    kernel = blur_kernel(sigma)
    check_points(points, *picture.shape[:2], len(kernel) // 2)
    return measure_each(points, lambda i: measure_window(picture, (points.x[i], points.y[i]), kernel, robust))


def measure_each(points, measure):
    """Return {index: measure(index)} of the measured points, from top to bottom. Keep errors that are Unusable."""
    found = {}
    for i in np.lexsort([points.x, points.y]):
        if not points.on_isoline[i]:
            try:
                found[i] = measure(i)
            except Unusable as error:
                found[i] = error
    return found


def measured_from(points, windows):
    """Return Measured of points, from the Window of each measured point, {index: Window}.

    Blocks of pixels can scatter more than single pixels suggest. Correlated noise (denoised or drizzled pictures) and
    faint stars cause this in all windows, structure only in some. So the noise of all levels is multiplied by the
    excess scatter of the calmer windows, the lower quartile.
    """
    level, noise, by_blocks = (np.array([getattr(windows[i], name) for i in points.leader]) for name in Window._fields)
    largest = np.abs(level).max()
    if largest and not 1e-140 < largest < 1e140:  # squares would overflow or vanish
        raise RmgradientError(f'levels up to {largest:.3g} are not from 1e-140 to 1e140; '
                              'multiply the picture by a power of ten')
    measured = ~points.on_isoline
    ratio = by_blocks[measured] / np.maximum(noise[measured], TINY)
    return Measured(points, level, noise * np.maximum(1, np.quantile(ratio, CALM, axis=0)))


def measure_window(picture, place, kernel, robust):
    """Return the Window of a picture around a place (x, y). Raise Unusable if it cannot be measured."""
    rows, columns = _around(picture, place, kernel)
    window = _robust_window if robust else _plain_window
    with np.errstate(invalid='ignore', over='ignore'):
        share, window = window(picture, rows, columns, kernel)
    check_window(share, window, kernel)
    return window


def _around(picture, place, kernel):
    """Return the rows and columns that a kernel covers around a place (x, y), as slices. Raise Unusable if masked."""
    (x, y), radius = place, len(kernel) // 2
    at = slice(int(y), int(y) + 1), slice(int(x), int(x) + 1)
    if picture.mask is not None and picture.is_masked(*at).any():
        raise Unusable('is in the mask; move it, or change the mask')
    return slice(y - radius, y + radius + 1), slice(x - radius, x + radius + 1)


def check_window(share, window, kernel):
    """Raise Unusable if a window has too few usable pixels, or too large values."""
    if share < LEAST_SHARE:
        raise Unusable(f'has data at only {100 * share:.0f} % of the averaged area ({len(kernel) // 2} pixels around '
                       'it); move it or use a smaller sigma')
    if not np.isfinite(window.level).all():
        raise Unusable('has values that are too large to average')


def _plain_window(picture, rows, columns, kernel):
    """Return the share of the weight on usable pixels, and a Window of their mean. Memory: 100 rows in float64."""
    squares = kernel**2
    # The Gaussian is separable. First along x: sums of values; with squared weights, of values and of their squares.
    sums, weights = np.zeros((3, len(kernel), picture.shape[2])), np.zeros((2, len(kernel)))
    for start, stop in row_groups(len(kernel)):
        values, usable = picture.usable(slice(rows.start + start, rows.start + stop), columns)
        values = np.where(usable[..., None], values, 0).astype(float)
        sums[:, start:stop] = kernel @ values, squares @ values, squares @ values**2
        weights[:, start:stop] = usable @ kernel, usable @ squares
    share = kernel @ weights[0] if weights[0].min() < 1 - 1e-9 else 1.0
    if share < LEAST_SHARE:
        return share, None
    level = kernel @ sums[0] / share
    first, second = squares @ sums[1:]
    noise = np.sqrt(np.maximum(second - 2 * level * first + level**2 * (squares @ weights[1]), 0)) / share
    return share, Window(level, noise, np.zeros_like(noise))


def _robust_window(picture, rows, columns, kernel):
    """Return the share of the weight on usable pixels, and a Window of their mean without outliers."""
    values, usable, kernel = _read_window(picture, rows, columns, kernel)
    return _mean_of(values, usable, usable & _is_near_median(values, usable), kernel)


def _read_window(picture, rows, columns, kernel):
    """Return (n_channels, n, n) float64 values, (n, n) usable, and the kernel. Large windows: 512 x 512 samples."""
    step = max(1, len(kernel) // 512)
    if step == 1:
        values, usable = picture.usable(rows, columns)
    else:
        parts = [picture.usable(slice(y, y + 1), columns) for y in range(rows.start, rows.stop, step)]
        values, usable = (np.concatenate([part[i][:, ::step] for part in parts]) for i in range(2))
        kernel = kernel[::step] / kernel[::step].sum()
    values = np.where(usable[..., None], values, 0).transpose(2, 0, 1)
    return np.ascontiguousarray(values, float), usable, kernel


def _is_near_median(values, usable):
    """Return where (n_channels, n, n) values are within `CLIP` deviations of the median of the usable values, bool."""
    data = values.reshape(len(values), -1) if usable.all() else values[:, usable]
    if not data.size:
        return np.zeros(values.shape, bool)
    median = medians(data)[:, None]
    reach, median = CLIP * 1.4826 * medians(np.abs(data - median))[:, None, None], median[..., None]
    # If more than half of the pixels are equal, as in drawn pictures, all values are kept.
    return (np.abs(values - median) <= reach) | (reach == 0)


def _mean_of(values, usable, kept, kernel):
    """Return the share of the weight on usable pixels, and a Window of the mean where kept, as in `_read_window`."""
    weights = kernel[:, None] * kernel
    share = weights.sum(where=usable)
    if share < LEAST_SHARE:
        return share, None
    weights = weights * kept
    total = weights.sum(axis=(1, 2))
    level = (weights * values).sum(axis=(1, 2)) / total
    noise = np.sqrt(((weights * (values - level[:, None, None])) ** 2).sum(axis=(1, 2))) / total
    return share, Window(level, noise, noise_of_blocks(values, weights, kernel, level))


def noise_of_blocks(values, weights, kernel, level):
    """Estimate the standard error of a level, (n_channels,), from `BLOCKS` x `BLOCKS` blocks of its window.

    Takes (n_channels, n, n) values and weights. A plane is subtracted from the means of the blocks, since a glow is not
    noise. Their scatter includes correlated noise. Returns 0 if blocks would have less than two pixels a side.
    """
    if len(kernel) < 2 * BLOCKS:
        return np.zeros_like(level)
    edges, root, plane = _blocks_of(kernel.tobytes())
    weight, total = (np.add.reduceat(np.add.reduceat(a, edges, axis=1), edges, axis=2).reshape(len(level), -1).T
                     for a in (weights, weights * values))
    means = np.where(weight > 0, total / np.where(weight > 0, weight, 1), level)
    residuals = without_trend(means * root, plane) / root
    variance = robust_std(residuals) ** 2 * len(root) / (len(root) - 3)
    return np.sqrt(variance * ((weight / weight.sum(axis=0)) ** 2).sum(axis=0))


@functools.lru_cache
def _blocks_of(kernel_bytes):
    """Return the first pixel of each block along a side, square roots of block weights, and terms of a plane.

    The terms are orthonormal, (n_blocks, 3).
    """
    kernel = np.frombuffer(kernel_bytes)
    edges = np.round(np.linspace(0, len(kernel), BLOCKS + 1)).astype(int)[:-1]
    middle = np.add.reduceat(np.arange(len(kernel)), edges) / np.diff([*edges, len(kernel)]) - len(kernel) / 2
    side = np.add.reduceat(kernel, edges)
    root = np.sqrt(np.outer(side, side)).reshape(-1, 1)
    x, y = np.meshgrid(middle, middle)
    return edges, root, np.linalg.qr(np.stack([np.ones(x.size), x.ravel(), y.ravel()], axis=1) * root)[0]


# ---- Choice of the model -------------------------------------------------------------------------

SHAPES = 2.0 ** np.arange(5)  # candidate shapes of the multiquadric, in units of the average distance between points
SMOOTHNESS = 10.0 ** np.arange(-5, 2.1, 0.5)  # candidates for scipy's `smooth`
LEAST_PLACES = 8  # smallest number of points for automatic points, a reference, and a tilted plane
EXACT = 1e-3  # noises of levels: smaller residuals count as zero
# Smallest width of the set of points over its length. If the points are closer to a line, the plane is not tilted
# across it. A 'tilted plane' needs less width, for example in a frame of 20000 x 60 pixels.
LEAST_ACROSS = {'plane': 0.01, 'tilted plane': 1e-5}
MOST_TILTED = 0.5  # a tilted plane must reduce the squared errors by this factor


def distances_between(a, b):
    """Return the (n_a, n_b) distances between (n_a, 2) and (n_b, 2) places."""
    return np.hypot(*(a[:, None] - b).transpose(2, 0, 1))


def distances_from(centers, is_target):
    """Return the (n_places,) distances of places from the nearest target, (n_places,) bool."""
    return distances_between(centers, centers[is_target]).min(axis=1, initial=np.inf)


def distances_among(places):
    """Return the (n_places, n_places) distances between places, infinite on the diagonal."""
    distances = distances_between(places, places)
    np.fill_diagonal(distances, np.inf)
    return distances


def average_spacing(centers):
    """Return the average distance between (n_points, 2) points in their bounding box: scipy's default epsilon."""
    edges = np.ptp(centers, axis=0)
    edges = edges[edges > 0]
    return (edges.prod() / len(centers)) ** (1 / len(edges))


def multiquadric(distances, epsilon):
    """Return the multiquadric of distances, as in scipy's Rbf."""
    return np.sqrt((distances / epsilon) ** 2 + 1)


def trend_terms(places, centers, trend):
    """Return the (n_places, n_terms) terms of a trend. They are orthonormal over the centers."""
    constant = np.full((len(places), 1), len(centers) ** -0.5)
    if trend == 'mean':
        return constant
    middle = centers.mean(axis=0)
    _, lengths, directions = np.linalg.svd(centers - middle, full_matrices=False)
    known = lengths > LEAST_ACROSS[trend] * lengths[0]
    return np.hstack([constant, (places - middle) @ directions[known].T / lengths[known]])


class AdaptiveModel(NamedTuple):
    """The chosen trend and multiquadric, solved, with their leave-one-out errors."""

    trend: str  # 'mean', 'plane' or 'tilted plane'
    epsilon: float  # shape of the multiquadric, in pixels
    smooth: float  # scipy's smoothness
    plane: np.ndarray | None  # (3, n_channels): coefficients of 1, x and y of the trend; None if points were left out
    weights: np.ndarray  # (n_points, n_channels) of the multiquadric, data units
    precision: np.ndarray  # (n_points, n_points): inverse of -kernel + smooth in the space orthogonal to the trend
    leader: np.ndarray  # (n_points,): equal for points that share a level
    errors: np.ndarray  # (n_points, n_channels): level minus prediction from the points with other levels, data units
    standardized: np.ndarray  # errors over the standard deviation that the model expects

    def __repr__(self) -> str:
        return (f'<AdaptiveModel: {self.trend}, multiquadric of shape {self.epsilon:.5g} pixels, smoothness '
                f'{self.smooth:.2g}, {len(self.weights)} points>')


class _Trend(NamedTuple):
    """A trend, and the residuals of the levels about it."""

    name: str
    terms: np.ndarray  # (n_points, n_terms), orthonormal
    residuals: np.ndarray  # (n_points, n_channels); those below rounding error count as zero
    is_rough: np.ndarray  # (n_channels,) bool: the channel has residuals


class _Spectrum(NamedTuple):
    """Eigenvalues of the multiquadric kernel in the space orthogonal to the constant."""

    epsilon: float
    eigenvalues: np.ndarray  # (n_points - 1,), of -kernel
    vectors: np.ndarray  # (n_points, n_points - 1)


def choose_model(points, levels, least_error=0.0):
    """Choose the trend, shape and smoothness that predict the background best between the points. Solve the model.

    Takes Points and their (n_points, n_channels) levels. Residuals up to least_error, (n_channels,) in data units,
    count as zero. Returns one AdaptiveModel for all channels, so that colors stay together. If the points have a least
    shape, the surface is stiff.

    With trend P and kernel matrix A of the multiquadric, weights w and trend coefficients b solve

        (A - smooth) w + P b = levels,    P' w = 0.

    The trend explains as much as it can. The multiquadric explains the residuals. This is well-posed, since -A is
    positive definite in the space orthogonal to P (Micchelli 1986, Constructive Approximation 2, 11).

    These equations are also those of kriging: a random field of covariance -A about the trend, with noise of variance
    `smooth`. Shape and smoothness maximize the restricted likelihood of the levels (Wahba 1990, Spline Models for
    Observational Data, section 4.8). With a dozen noisy points this is more stable than leave-one-out errors, which
    sometimes prefer a rough surface by chance. Likelihoods of different trends cannot be compared. So leave-one-out
    errors choose the trend (`left_out_errors`).
    """
    problem = points.centers, levels, points.leader
    rounding = np.maximum(1e-10 * np.abs(levels).max(axis=0), least_error)
    scale = levels.std(axis=0) + rounding + TINY
    # A plane through three points has no errors, and is chosen.
    with one_blas_thread:
        return min(_likeliest_of_each_trend(problem, rounding, points.least_shape),
                   key=lambda model: ((model.errors / scale) ** 2).mean()
                   / (MOST_TILTED if model.trend == 'tilted plane' else 1))


def _likeliest_of_each_trend(problem, rounding, least_shape):
    """Return an AdaptiveModel for each trend. Residuals below the rounding error of a channel count as zero.

    One eigendecomposition of -A for each shape is enough. With it, each smoothness and each trend cost a few sums.
    """
    centers, levels, _ = problem
    distances, spacing = distances_between(centers, centers), average_spacing(centers)
    shapes = np.maximum(SHAPES * spacing, SHAPES**0.5 * least_shape)
    # Above n_points / 3 the largest eigenvalue of A, n_points or more, is too close to smooth: A - smooth
    # is singular.
    smoothness = SMOOTHNESS[len(distances) / 3 >= SMOOTHNESS]
    trends = []
    for name in ('mean', *LEAST_ACROSS):
        terms = trend_terms(centers, centers, name)
        if name == 'tilted plane' and (terms.shape[1] == trends[-1].terms.shape[1] or len(centers) < LEAST_PLACES):
            break
        residuals = without_trend(levels, terms)
        is_rough = (np.abs(residuals) > rounding).any(axis=0)
        trends.append(_Trend(name, terms, residuals * is_rough, is_rough))

    def judge(epsilon):
        """Return a spectrum, and for each trend its negative log-likelihood and its smoothness."""
        spectrum = _decompose(multiquadric(distances, epsilon), epsilon)
        return spectrum, [_likeliest(spectrum, smoothness, trend) for trend in trends]

    # Without residuals, shape and smoothness do not matter.
    nothing = _Spectrum(shapes[0], np.zeros(len(centers) - 1), np.zeros((len(centers), len(centers) - 1)))
    best = [(math.inf, 1.0, nothing) for _ in trends]
    if any(trend.is_rough.any() for trend in trends):
        # Up to some 250 points, threads cost more time than they save.
        for spectrum, judged in (in_two_threads if len(centers) > 250 else map)(judge, shapes):
            best = [min(so_far, (*each, spectrum), key=lambda one: one[0]) for so_far, each in zip(best, judged)]
    return [_solve(problem, trend, *choice) for trend, (_, *choice) in zip(trends, best)]


def _decompose(kernel, epsilon):
    """Return the _Spectrum of a (n_points, n_points) kernel of some shape."""
    means = kernel.mean(axis=0)
    # The constant vector is shifted to the largest eigenvalue, and then dropped.
    matrix = means[:, None] + means - kernel
    matrix += 2 * means.max() - means.mean()
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return _Spectrum(float(epsilon), np.maximum(eigenvalues[:-1], 0), vectors[:, :-1])


def _likeliest(spectrum, smoothness, trend):
    """Return the negative log-likelihood of the residuals of a trend with the best smoothness, and that smoothness.

    Generalized least squares removes the terms of the trend other than the mean. Let v be the variance along the
    eigenvectors, X the terms and r the residuals there, H = X' X / v and b = X' r / v. Then the misfit r' r / v
    becomes smaller by b' H^-1 b, and the determinant of v is multiplied by that of H.
    """
    if not trend.is_rough.any():
        return math.inf, 1.0
    variance = spectrum.eigenvalues + smoothness[:, None]
    residuals = trend.residuals[:, trend.is_rough]
    r, x = spectrum.vectors.T @ residuals, spectrum.vectors.T @ trend.terms[:, 1:]
    h, b = (np.einsum('sk,ki,kj->sij', 1 / variance, x, a, optimize=True) for a in (x, r))
    misfit = (1 / variance) @ r**2 - (b * np.linalg.solve(h, b)).sum(axis=1)
    unlikely = np.log(variance).sum(axis=1) + np.linalg.slogdet(h)[1]
    n_free = len(trend.terms) - trend.terms.shape[1]
    unlikely = residuals.shape[1] * unlikely + n_free * np.log(misfit).sum(axis=1)
    unlikely = np.round(unlikely, 9)  # equal ones, as of four points and a plane: argmin takes the first
    i = unlikely.argmin()
    return unlikely[i], smoothness[i]


def _solve(problem, trend, smooth, spectrum):
    """Return the AdaptiveModel of a trend, a smoothness and the _Spectrum of a shape.

    The problem is a tuple of centers, levels and leader as in `choose_model`.
    """
    centers, levels, leader = problem
    terms, residuals = trend.terms, trend.residuals
    if trend.is_rough.any():
        precision = (spectrum.vectors / (spectrum.eigenvalues + smooth)) @ spectrum.vectors.T
        along = precision @ terms[:, 1:]
        precision -= along @ np.linalg.solve(terms[:, 1:].T @ along, along.T)
    else:
        precision = np.eye(len(centers))
    kernel = multiquadric(distances_between(centers, centers), spectrum.epsilon)
    weights = np.zeros_like(levels)
    for _ in range(2):  # the second pass removes rounding errors of the first
        weights = without_trend(weights - precision @ residuals, terms)
        trend_levels = levels - (kernel @ weights - smooth * weights)
        residuals = without_trend(trend_levels, terms) * trend.is_rough
    middle, slope = centers.mean(axis=0), np.zeros((2, levels.shape[1]))
    if trend.name != 'mean':
        slope = np.linalg.pinv(centers - middle, rcond=LEAST_ACROSS[trend.name]) @ trend_levels
    plane = np.vstack([trend_levels.mean(axis=0) - middle @ slope, slope])
    return AdaptiveModel(trend.name, float(spectrum.epsilon), float(smooth), plane, weights, precision, leader,
                         *left_out_errors(weights, precision, leader))


def left_out_errors(weights, precision, leader):
    """Return leave-one-out errors, in data units and standardized, (n_points, n_channels) each.

    The error is level minus prediction from the points with other levels. The standardized error is the error over the
    standard deviation that the model expects, up to a common factor. Arguments as in `AdaptiveModel`.

    With precision G, the errors of points i that are left out together are `-G_ii^-1 w_i`. So no model needs to be
    fitted again (Rippa 1999, Advances in Computational Mathematics 11, 193, for single points).
    """
    # If the other points do not determine the trend, a point cannot be judged, and its error is 0.
    diagonal = np.diag(precision)
    judged = diagonal > 1e-12 * diagonal.max()
    variance = np.where(judged, 1 / np.where(judged, diagonal, 1), 0)[:, None]
    errors = -variance * weights
    for first, n_points in zip(*np.unique(leader, return_counts=True)):
        if n_points > 1:
            left_out = np.flatnonzero(leader == first)
            covariance = np.linalg.pinv(precision[np.ix_(left_out, left_out)], hermitian=True)
            errors[left_out] = -covariance @ weights[left_out]
            variance[left_out, 0] = np.diag(covariance)
    return errors, errors / np.sqrt(np.where(variance > 0, variance, 1))


def krige(model, centers, places):
    """Return the weights of the centers in predictions at (n_places, 2) places, and the variance of the predictions.

    The weights are (n_centers, n_places). The variance of the surface is (n_places,), in the units of standardized
    errors. The variance of a level is larger by `model.smooth`. The equations of `choose_model` are those of kriging
    (Cressie 1993, Statistics for Spatial Data, section 3.4).
    """
    n_centers = len(centers)
    inside, at = (np.hstack([multiquadric(distances_between(where, centers), model.epsilon),
                             trend_terms(where, centers, model.trend)]) for where in (centers, places))
    n_terms = inside.shape[1] - n_centers
    equations = np.vstack([inside, np.hstack([inside[:, n_centers:].T, np.zeros((n_terms, n_terms))])])
    equations[range(n_centers), range(n_centers)] -= model.smooth
    shares = np.linalg.solve(equations, at.T)
    return shares[:n_centers], np.maximum(np.einsum('ij,ji->i', at, shares) - 1, 0)


def without_points(model, left_out):
    """Return an AdaptiveModel without some points, (n_points,) bool, with the same trend, shape and smoothness."""
    # The Schur complement is faster than to solve the equations again.
    corner = model.precision[np.ix_(~left_out, left_out)]
    share = corner @ np.linalg.pinv(model.precision[np.ix_(left_out, left_out)], hermitian=True)
    weights, leader = model.weights[~left_out] - share @ model.weights[left_out], model.leader[~left_out]
    precision = model.precision[np.ix_(~left_out, ~left_out)] - share @ corner.T
    return AdaptiveModel(model.trend, model.epsilon, model.smooth, None, weights, precision, leader,
                         *left_out_errors(weights, precision, leader))


# ---- Model and fit ---------------------------------------------------------------------------------------

BLOCK = 2**17  # float64 values: with fewer, threads wait for the interpreter; with more, they leave the cache


class BackgroundModel(NamedTuple):
    """A fitted background: a plane plus a multiquadric for each channel."""

    centers: np.ndarray  # (n_points, 2): centers of the multiquadrics, x and y, in pixels
    weights: np.ndarray  # (n_points, n_channels), in data units
    epsilon: float  # shape of the multiquadric, in pixels
    plane: np.ndarray  # (3, n_channels): coefficients of 1, x and y

    def __repr__(self) -> str:
        return (f'<BackgroundModel: {len(self.centers)} centers, {self.n_channels} channels, shape {self.epsilon:.5g} '
                'pixels>')

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return self.plane.shape[1]

    def above(self, sky: np.ndarray) -> BackgroundModel:
        """Return the model minus the (n_channels,) sky level: the values to subtract."""
        return self._replace(plane=self.plane - [sky, 0 * sky, 0 * sky])

    def shrunk(self, factor: int, left: int = 0, top: int = 0) -> BackgroundModel:
        """Return the model of a window that begins at (left, top), in pixels that are factor times as large."""
        first = np.array([left, top]) + (factor - 1) / 2  # middle of the first large pixel
        constant, slope = self.plane[0], self.plane[1:]
        plane = np.vstack([constant + first @ slope, factor * slope])
        centers = (self.centers - first) / factor
        return self._replace(centers=centers, epsilon=self.epsilon / factor, plane=plane)

    def blocks(self, start: int, stop: int, width: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Yield slices of rows (counted from start) and columns, and the background there, float64 in data units.

        The surface is evaluated at Chebyshev nodes, and interpolated by two matrix products, first along x, then along
        y. Memory: 8 bytes x n_channels x width x (nodes along y), and one block. A block has 1 MB, or a single column
        of the rows if that is more.
        """
        for top, y_matrix, along_x in self._panels(start, stop, width):
            n_rows = len(y_matrix)
            step = max(1, BLOCK // (n_rows * self.n_channels))
            for left in range(0, width, step):
                columns = slice(left, min(left + step, width))
                background = y_matrix @ along_x[:, columns].reshape(len(along_x), -1)
                yield slice(top, top + n_rows), columns, background.reshape(n_rows, -1, self.n_channels)

    def evaluate(self, start: int, stop: int, width: int) -> np.ndarray:
        """Return the background of rows start to stop - 1, (stop - start, width, n_channels) float64, data units."""
        background = np.empty((stop - start, width, self.n_channels))
        for rows, columns, block in self.blocks(start, stop, width):
            background[rows, columns] = block
        return background

    def _panels(self, start, stop, width):
        """Yield first row and matrix of each panel of rows, and (n_nodes, width, n_channels) values at its nodes."""
        x_nodes, x_matrix = chebyshev_panels(width, self.epsilon)
        y_nodes, y_matrix = chebyshev_panels(stop - start, self.epsilon)
        for top, nodes in zip(range(0, stop - start, len(y_matrix)), start + y_nodes):
            at_nodes = self._at_nodes(x_nodes.ravel(), nodes).reshape(*x_nodes.shape, -1)
            along_x = (x_matrix @ at_nodes).reshape(-1, len(nodes), self.n_channels)[:width]
            yield top, y_matrix[:stop - start - top], np.ascontiguousarray(along_x.transpose(1, 0, 2))

    def at_grid(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the background on a grid, (len(y), len(x), n_channels) float64, in data units."""
        return self._at_nodes(x, y).transpose(1, 0, 2)

    def _at_nodes(self, x, y):
        """Return (len(x), len(y), n_channels) values, `BLOCK` pairs of node and center at a time."""
        center_x, center_y = self.centers.T
        scale = 1 / self.epsilon
        dy2 = ((y[:, None] - center_y) * scale) ** 2 + 1
        values = np.empty((len(x), len(y), self.n_channels))
        step = max(1, BLOCK // len(self.centers))
        for column in range(0, len(x), step):
            here = slice(column, column + step)
            dx2 = ((x[here, None] - center_x) * scale) ** 2
            for row in range(len(y)):
                values[here, row] = np.sqrt(dx2 + dy2[row]) @ self.weights
        constant, along_x, along_y = self.plane
        return values + (constant + x[:, None] * along_x)[:, None] + y[:, None] * along_y


@functools.lru_cache(maxsize=16)
def chebyshev_panels(n_pixels, epsilon):
    """Place nodes from which a multiquadric of shape epsilon can be interpolated at each pixel of a line.

    Returns (n_panels, n_nodes) positions relative to the first pixel, and a (n_panel_pixels, n_nodes) matrix. The
    matrix maps values at the nodes of a panel to values at its pixels, exact to rounding. The panels have equal
    lengths. The last one may end beyond the line.

    Along a line, sqrt((r / epsilon)^2 + 1) has no singularity closer to the real axis than epsilon. On an interval of
    half length h it is analytic inside the Bernstein ellipse of parameter rho = s + sqrt(1 + s^2), s = epsilon / h.
    Let M be its bound there. Then the polynomial of degree n through Chebyshev nodes has an error of at most
    4 M rho^-n / (rho - 1) (Trefethen, Approximation Theory and Approximation Practice, theorem 8.2). We take the
    degree that makes this smaller than the rounding error of the multiquadrics, 2^-52 M. Panels of two epsilon need
    the fewest operations, about 40 nodes. If a panel has fewer pixels, the pixels are the nodes.
    """
    n_panels = math.ceil(n_pixels / (2 * epsilon + 1))
    panel = math.ceil(n_pixels / n_panels)
    half = max(panel - 1, 1) / 2
    s = epsilon / half
    rho = s + math.sqrt(1 + s * s)
    n_nodes = 1 + math.ceil(math.log(4 * 2**52 / (rho - 1)) / math.log(rho))
    if n_nodes < panel:
        angles = (np.arange(n_nodes) + 0.5) * (np.pi / n_nodes)
        nodes = half - half * np.cos(angles)
        # The barycentric formula is the most accurate one (Trefethen, chapter 5).
        away = np.arange(panel)[:, None] - nodes
        matrix = (-1.0) ** np.arange(n_nodes) * np.sin(angles) / np.where(away, away, 1e-200)
        matrix /= matrix.sum(axis=1, keepdims=True)
    else:
        nodes, matrix = np.arange(float(panel)), np.eye(panel)
    return np.arange(n_panels)[:, None] * panel + nodes, matrix


class Fit(NamedTuple):
    """A background fitted to levels."""

    measured: Measured  # points of the model, and the levels of the background there
    model: BackgroundModel
    adaptive: AdaptiveModel | None = None  # how the adaptive model was chosen; None for the classic one
    reference: ReferenceFit | None = None  # how well the reference fits, if there is one

    def __repr__(self) -> str:
        kind = f'{"adaptive" if self.adaptive else "classic"}{", with a reference" if self.reference else ""}'
        return f'<Fit: {kind}, {self.measured.points!r}, {self.model!r}>'


def fit_background(measured: Measured, smooth: float | str = 'auto') -> Fit:
    """Fit a smooth surface through the levels.

    Parameters
    ----------
    measured : Measured
        Levels at points, from `measure_levels` or `choose_points`.
    smooth : 'auto' or float
        'auto': the adaptive model. Trend, shape and smoothness are chosen to predict the levels best. A number: the
        classic model, a multiquadric with scipy's default shape and this smoothness, without a trend.

    Raises
    ------
    RmgradientError
        If there are less than two points, or the smoothness is not a number from 0, or makes the equations singular.
    """
    points, levels = measured.points, measured.levels
    if len(levels) < 2:
        raise RmgradientError('a surface needs at least two points')
    if Settings(smooth=smooth).is_adaptive:
        # Residuals far below the noise come from an exact reference. They would determine the shape alone.
        adaptive = choose_model(points, levels, EXACT * np.median(measured.noise, axis=0))
        model = BackgroundModel(points.centers, adaptive.weights, adaptive.epsilon, adaptive.plane)
        return Fit(measured, model, adaptive)
    from scipy.interpolate import Rbf  # takes longer to import than most pictures to correct
    with no_warnings():  # "ill-conditioned" is tested below
        try:
            rbf = Rbf(*points.centers.T, levels, function='multiquadric', mode='N-D', smooth=smooth)
            off = np.abs(rbf.A @ rbf.nodes - levels).max()
        except np.linalg.LinAlgError:
            off = math.inf
    if not off <= 1e-6 * np.abs(levels).max():
        raise RmgradientError(f'smoothness {smooth} makes the equations of these points singular; '
                              'choose another')
    return Fit(measured, BackgroundModel(points.centers, rbf.nodes, rbf.epsilon, np.zeros((3, levels.shape[1]))))


# ---- Misfits -------------------------------------------------------------------------------------

MISFIT = 6.0  # standard deviations: a point with a larger error gets a warning
# Points hardly agree if the RMS of their errors is above UNLIKELY noises of levels, and UNRELATED times their scatter.
UNLIKELY, UNRELATED = 25.0, 0.5


def find_misfits(fit: Fit) -> list[tuple[int, float]]:
    """Find points whose level differs from the prediction of the others.

    Parameters
    ----------
    fit : Fit
        Of the adaptive model. The classic model makes no predictions, and has no misfits.

    Returns
    -------
    list of (int, float)
        Index of the point, and its error in the worst channel, in data units. It is positive if the point is too
        bright. The most significant point comes first.

    Notes
    -----
    A bad point spoils the prediction of its neighbors and the choice of the model. So the model is chosen again
    without the worst points, and tests the others, until no more are found. Two points on one nebula mask each other,
    so neighbors are also tested in pairs.
    """
    if not fit.adaptive:
        return []
    points, levels, noise = fit.measured[:3]
    model, kept, misfits, least_error = fit.adaptive, np.arange(len(levels)), [], MISFIT * np.median(noise, axis=0)
    while worst := (_find_worst(model, points.centers[kept], least_error)
                    or _find_pair(model, points.centers[kept], least_error)):
        misfits += [(int(kept[i]), float(error)) for i, error in worst]
        kept = kept[~np.isin(points.leader[kept], points.leader[[i for i, _ in misfits]])]
        if len(kept) < 4:
            break
        model = choose_model(points.subset(np.isin(np.arange(len(levels)), kept)), levels[kept])
    return misfits


def _find_worst(model, centers, least_error):
    """Return index and error of the points with at least half the error of the worst.

    An error must be larger than the least error, and than `MISFIT` times the typical error of all points and of its
    eight nearest neighbors: where a glow is steep, all points are hard to predict.
    """
    kept, worst_points, acquitted, limit = np.arange(len(centers)), [], [], MISFIT
    while len(kept) > 3:
        significant = np.abs(significance(model.errors, model.standardized, least_error))
        significant[np.isin(kept, acquitted)] = 0
        worst, channel = np.unravel_index(significant.argmax(), significant.shape)
        if significant[worst, channel] <= limit:
            break
        out = model.leader == model.leader[worst]
        others, usual = _usual_around(model, centers[kept], worst, out)
        if np.abs(model.standardized[worst, channel]) <= MISFIT * usual[channel]:
            acquitted.append(kept[worst])
            continue
        limit = max(limit, significant[worst, channel] / 2)
        worst_points.append((kept[worst], model.errors[worst, channel]))
        model, kept = others, kept[~out]
    return worst_points


def _usual_around(model, centers, i, out):
    """Return the AdaptiveModel without some points, and its typical standardized error around one of them."""
    others = without_points(model, out)
    nearest_points = np.argsort(distances_between(centers[~out], centers[[i]])[:, 0])[:8]
    return others, robust_std(others.standardized[nearest_points])


def _find_pair(model, centers, least_error):
    """Return index and error of the worst point of pairs, and of its nearest neighbor if that is a misfit, too.

    As `_find_worst`, but both points of a pair are left out together. Points on isolines are not tested. With
    precision G, weights w and the pair i, j, the errors of `left_out_errors` are

        e_i = (G_ij w_j - G_jj w_i) / d,    d = G_ii G_jj - G_ij^2,

    since (G_jj, -G_ij; -G_ij, G_ii) / d is the inverse of the two rows and columns of G. The variance of e_i is
    G_jj / d.
    """
    leaders, counts = np.unique(model.leader, return_counts=True)
    alone = np.flatnonzero(np.isin(model.leader, leaders[counts == 1]))
    if len(alone) < LEAST_PLACES:
        return []
    pairs = np.stack([alone, alone[distances_among(centers[alone]).argmin(axis=1)]])
    g_ii, g_jj = np.diag(model.precision)[pairs][..., None]
    g_ij, (w_i, w_j) = model.precision[*pairs][:, None], model.weights[pairs]
    d = g_ii * g_jj - g_ij**2
    judged = d > 1e-12 * g_ii.max() ** 2
    errors = np.stack([g_ij * w_j - g_jj * w_i, g_ij * w_i - g_ii * w_j])
    errors = np.where(judged, errors / np.where(judged, d, 1), 0)
    standardized = errors * np.sqrt(np.where(judged, d / np.stack([g_jj, g_ii]), 0))
    significant = np.abs(significance(errors, standardized, least_error, standardized[0]))
    worst, channel = np.unravel_index(significant[0].argmax(), significant[0].shape)
    stand_out = significant[:, worst, channel] > MISFIT
    if not stand_out[0]:
        return []
    pair = pairs[:, worst]
    _, usual = _usual_around(model, centers, pair[0], np.isin(np.arange(len(centers)), pair))
    if np.abs(standardized[0, worst, channel]) <= MISFIT * usual[channel]:
        return []
    return list(zip(pair[stand_out], errors[stand_out, worst, channel]))


def hardly_agree(fit):
    """Whether the leave-one-out errors of the adaptive model are too large to trust the points."""
    off = rms(fit.adaptive.errors)
    noise, scatter = np.median(fit.measured.noise, axis=0), fit.measured.levels.std(axis=0)
    return (off > np.maximum(UNLIKELY * noise, UNRELATED * scatter)).any()


def rms(errors):
    """Return the root mean square of each channel, (n_channels,)."""
    return np.sqrt((errors**2).mean(axis=0))


@np.errstate(over='ignore')  # relative to errors of zero, others are infinite
def significance(errors, standardized, least, usual=None):
    """Return each standardized error over the typical one, and 0 for errors up to the least error.

    Errors and standardized errors as in `left_out_errors`. The least error is (n_channels,), in data units. The
    typical error comes from `usual`, standardized errors of other points, or from the errors themselves.
    """
    usual = robust_std(standardized if usual is None else usual)
    return np.where(np.abs(errors) > least, standardized / usual, 0)


# ---- Reference -----------------------------------------------------------------------------------

REFERENCE_AUTO = 24  # cells along the longer side: points may be on nebulae, so more points are better
REFERENCE_MISFIT = 5.0  # typical errors: points that fit the reference worse are left out
MISREGISTERED = 2.5  # noises of levels: if residuals are larger, the reference does not suit the picture
SAME = 0.05  # noises of levels: two exposures never agree so well
FAR = 300.0  # standard deviations: levels farther from the median are not light
WEAK = 0.03  # relative error of the scale: if it is larger without stars, levels with stars are better
BENT, BENT_NOISES = 8.0, 1.0  # errors, and noises of levels: with a larger quadratic term, the reference is not linear
LEAST_CORRELATION = 0.5  # of details: above 0.9 for the same field, below 0.15 for another field
# Registration by stars
MOST_STARS, LEAST_STARS = 400, 8  # to refine a registration, and to accept it
BRIGHT, STAR = 50, 6.0  # stars whose triangles are compared; standard deviations above the surroundings
MATCHED = 1.0  # binned pixels: closer stars are the same
BINNED = 1200  # binned pixels along the longer side
MOST_SHIFT, MOVED = 100, 1.0  # pixels: largest shift between pictures of one size, and smallest one that is corrected


class ReferenceFit(NamedTuple):
    """How well a reference fits the picture."""

    kept: np.ndarray  # (n_points,) bool: points that fit the reference
    scale: np.ndarray  # (n_channels,): light in the picture over light in the reference
    error: np.ndarray  # (n_channels,): standard error of the scale
    unexplained: np.ndarray  # (n_channels,): standard deviation of the residuals, data units
    bend: np.ndarray  # (2, n_channels): RMS of the quadratic term of its light, data units; and this over its error
    explained: np.ndarray  # (n_channels,) bool: the reference shows the details of this channel; else it is not used

    def __repr__(self) -> str:
        return f'<ReferenceFit: {np.count_nonzero(self.kept)} of {len(self.kept)} points fit, scale {self.scales}>'

    @property
    def scales(self) -> str:
        """The scale of each channel and its standard error, as text."""
        return ', '.join(f'{scale:.4g} \u00b1 {error:.2g}' for scale, error in zip(self.scale, self.error))


class NotRegistered(RmgradientError):
    """A reference does not show the details of a picture, or cannot be registered to it."""


def fit_with_reference(measured: Measured, reference: ArrayLike) -> Fit:
    """Fit the background of a picture with a reference: a picture of the same field with less gradient.

    Parameters
    ----------
    measured : Measured
        Levels of the picture, on nebulae and on empty sky.
    reference : (n_points, n_channels) or (n_points, 1) array_like
        Levels of the reference at the same points, in its own units. A gray reference is used for all channels. The
        median of these levels counts as no light.

    Raises
    ------
    RmgradientError
        If there are fewer than eight points with levels of their own, if levels of the reference have another shape or
        are not finite, or if the reference does not show the details of the picture.
    """
    levels = measured.levels
    try:
        reference = np.asarray(reference)
        if reference.dtype.kind not in 'iuf':
            raise TypeError
        reference = reference.astype(float)
    except (TypeError, ValueError, OverflowError) as error:
        raise RmgradientError('levels of a reference are not numbers') from error
    if reference.shape not in (levels.shape, (len(levels), 1)) or not (np.abs(reference) < 1e140).all():
        raise RmgradientError(f'levels of a reference of shape {reference.shape} are not finite numbers for a picture '
                              f'with levels of shape {levels.shape}')
    known = ReferenceLevels(reference, reference, levels, np.median(reference, axis=0))
    return _fit_measured_reference(measured._replace(reference=known))


def _fit_measured_reference(measured):
    """Fit the background of a picture with its measured reference, see `fit_with_reference`.

    Stars have other colors and sizes in another picture. So levels without stars are compared, from the same pixels of
    both pictures. In channels where only stars determine the scale, levels with stars are compared. A channel that the
    reference does not explain (noise, or other light) is fitted without it.
    """
    levels, reference = measured.levels, measured.reference
    if len(np.unique(measured.points.leader)) < LEAST_PLACES:
        raise RmgradientError(f'{len(levels)} points are too few to separate its light from the background; '
                              f'give at least {LEAST_PLACES}')
    light, with_stars = (np.broadcast_to(each - reference.zero, levels.shape)
                         for each in (reference.levels, reference.plain))
    fit = _fit_kept(measured, light)
    weak = ~(fit.reference.error < WEAK * np.abs(fit.reference.scale))
    if weak.any() and reference.plain is not reference.levels:
        measured = measured._replace(levels=np.where(weak, reference.ours, levels))
        light = np.where(weak, with_stars, light)
        fit = _fit_kept(measured, light)
    if not fit.reference.explained.any():
        # Starting from a scale of 0, the fit would take a broad nebula for background.
        plane = trend_terms(measured.points.centers, measured.points.centers, 'plane')
        detail, ours = without_trend(light, plane), without_trend(measured.levels, plane)
        start = (detail * ours).sum(axis=0) / np.maximum((detail**2).sum(axis=0), TINY)
        fit = _fit_kept(measured, light, start)
    explained = fit.reference.explained
    if not explained.any():
        raise NotRegistered('its details are not those of the picture; is it registered, and does it show the same '
                            'field?')
    if explained.all():
        return fit
    fit = _fit_kept(measured, light * explained)
    return fit._replace(reference=fit.reference._replace(explained=explained))


def _fit_kept(measured, light, start=0.0):
    """Fit a picture with the (n_points, n_channels) light of a reference, starting from a scale.

    The model is picture = scale x reference + background: kriging with external drift (Chiles and Delfiner 2012,
    Geostatistics, section 5.6). For a given shape and smoothness, generalized least squares gives the scale. Kriging
    of the residuals gives the background. Both steps alternate until the scale is stable. Points that fit badly, for
    example on satellites and moved objects, are left out, and the fit is repeated.
    """
    leader = measured.points.leader
    # A single huge value, for example one that means no data, would determine the scale alone.
    kept = np.all([np.abs(each - np.median(each, axis=0)) <= FAR * robust_std(each - np.median(each, axis=0))
                   for each in (light, measured.levels)], axis=(0, 2))
    kept &= kept[leader]
    if kept.sum() < LEAST_PLACES:
        kept[:] = True
    for i in range(10):
        fit, scale, error, correlation = _fit_scale(measured.subset(kept), light[kept], start)
        standardized = np.abs(fit.adaptive.standardized)
        fits = (standardized <= REFERENCE_MISFIT * robust_std(standardized)).all(axis=1)
        is_hopeless = i > 1 and not (correlation >= LEAST_CORRELATION).any()
        if i == 9 or fits.all() or fits.sum() < LEAST_PLACES or is_hopeless:
            break
        kept[kept] = fits
        kept &= kept[leader]  # an isoline without its first point has no level
    background = measured.subset(kept)
    background = background._replace(levels=background.levels - scale * light[kept])
    found = ReferenceFit(kept, scale, error, rms(fit.adaptive.errors), _bend_of(fit, background, light[kept]),
                    correlation >= LEAST_CORRELATION)
    return fit._replace(measured=background, reference=found)


@np.errstate(over='ignore', divide='ignore', invalid='ignore')  # a constant reference explains nothing
def _fit_scale(measured, light, start):
    """Return the Fit, the scale, its standard error, and the correlation of details of each channel."""
    points, levels = measured.points, measured.levels
    scale = np.zeros(levels.shape[1]) + start
    for _ in range(10):
        fit = fit_background(measured._replace(levels=levels - scale * light))
        terms = trend_terms(points.centers, points.centers, fit.adaptive.trend)
        detail, ours = without_trend(light, terms), without_trend(levels, terms)
        weighted = fit.adaptive.precision @ detail
        own, shared = (weighted * detail).sum(axis=0), (weighted * ours).sum(axis=0)
        before, scale = scale, shared / np.maximum(own, TINY)
        if np.abs(scale - before).max() <= 1e-6 * np.abs(scale).max():
            break
    total = (ours * (fit.adaptive.precision @ ours)).sum(axis=0)
    left = np.maximum(total - scale * shared, 0) / max(1, len(levels) - terms.shape[1] - 1)
    correlation = shared / np.sqrt(np.maximum(own * total, TINY))
    return fit, scale, np.sqrt(left / np.maximum(own, TINY)), correlation


@np.errstate(all='ignore')  # a constant reference
def _bend_of(fit, background, light):
    """Return the quadratic term of the reference's light, see `ReferenceFit`. It is 0 if both are linear."""
    centers, precision = background.points.centers, fit.adaptive.precision
    terms = trend_terms(centers, centers, fit.adaptive.trend)
    detail, curved, left = (without_trend(each, terms) for each in (light, light**2, background.levels))
    known = precision @ detail
    curved = curved - detail * ((curved * known).sum(axis=0) / (detail * known).sum(axis=0))
    weighted = precision @ curved
    own, shared = (weighted * curved).sum(axis=0), (weighted * left).sum(axis=0)
    total = (left * (precision @ left)).sum(axis=0)
    error = np.sqrt(np.maximum(total - shared**2 / own, 0) / max(1, len(left) - terms.shape[1] - 2) / own)
    return np.nan_to_num(np.stack([np.abs(shared / own) * rms(curved), np.abs(shared / own) / error]))


def check_reference_fit(fit, picture, sigma):
    """Return Findings for a reference that does not explain the picture, or is not linear."""
    reference, noise, scale, findings = fit.reference, np.median(fit.measured.noise, axis=0), picture.scale, []
    if not reference.explained.all():
        names = [name_of_channel(i, len(noise)) for i in np.flatnonzero(~reference.explained)]
        findings.append(Finding(
            'channel', f'the reference does not explain {" and ".join(names)}, which is corrected without it',
            'use a reference that shows the same light', numbers={'channels': names}))
    if (reference.unexplained > MISREGISTERED * noise)[reference.explained].any():
        findings.append(Finding(
            'reference', f'the reference fits the points only to {in_words(scale * reference.unexplained)}, and the '
            f'noise of their levels is {in_words(scale * noise)}', 'is it registered, and in the same colors?',
            numbers={'noises': float((reference.unexplained / noise).max())}))
    size, significant = np.median((reference.bend / [noise, 1 + 0 * noise])[:, reference.explained], axis=1)
    if significant > BENT and size > BENT_NOISES:
        findings.append(Finding(
            'not linear', f'the reference is stretched: its light is not proportional to that of the picture, by '
            f'{rounded(scale * size * noise.mean())}', 'use one that is not stretched',
            numbers={'noises': float(size), 'significance': float(significant)}))
    # The noise of pixels alone: in a nebula, the noise of levels includes structure.
    if (same := reference.unexplained < SAME * picture.tiles.noise / (2 * math.sqrt(math.pi) * sigma)).any():
        names = ' and '.join(name_of_channel(i, len(noise)) for i in np.flatnonzero(same))
        findings.append(Finding('same', f'the reference has the same noise as the picture ({names}), so its '
                                'gradient stays', 'use another exposure'))
    if n_lost := fit.measured.reference.n_lost:
        findings.append(Finding('lost', f'{n_lost} given points have no data on the reference and are left out',
                                'move them, or use another reference', numbers={'points': n_lost}))
    return findings


def name_of_channel(i, n_channels):
    """Return the name of a color channel."""
    return ('red', 'green', 'blue')[i] if n_channels == 3 else f'channel {i + 1}'


class Reference:
    """A picture of the same field with less gradient, and the map from the pixels of the picture to its pixels."""

    def __init__(self, picture, locate=None, where='', is_sure=False):
        self.picture, self.path, self.where, self.is_sure = picture, picture.path, where, is_sure
        self._locate = locate  # None: the same pixels

    @property
    def is_aligned(self):
        """Whether it has the same pixels as the picture."""
        return self._locate is None

    @functools.cached_property
    def zero(self):
        """The (n_channels,) median of the picture, which counts as no light."""
        medians = self.picture.tiles.medians
        known = np.isfinite(medians).all(axis=2)
        return np.median(medians[known], axis=0) if known.any() else np.zeros(self.picture.shape[2])

    def locate(self, places):
        """Return the (n, 2) coordinates on the reference, and the (n, 2, 2) derivatives of the map."""
        there = self._locate(places)
        return there, np.stack([self._locate(places + step) - there for step in np.eye(2)], axis=2)

    def light_at(self, tiles):
        """Return its medians at the Tiles of the picture, (n_down, n_across, n_channels), NaN outside the reference."""
        own = self.picture.tiles
        if self.is_aligned:
            return own.medians
        from scipy.ndimage import map_coordinates
        x, y = np.meshgrid(tiles.x, tiles.y)
        there = self._locate(np.stack([x.ravel(), y.ravel()], axis=1)).T
        at = [np.interp(each, centers, np.arange(len(centers)), np.nan, np.nan)
              for each, centers in zip(there[::-1], (own.y, own.x))]
        at = np.where(np.isfinite(at), at, -9.0)
        light = [map_coordinates(each, at, order=1, cval=np.nan) for each in np.moveaxis(own.medians, 2, 0)]
        return np.stack(light, axis=1).reshape(*x.shape, -1)


def measure_with_reference(pictures, points, sigma, given=None):
    """Return Measured of points, with the levels of a Reference. `pictures` is a tuple of Picture and Reference.

    `given` tells which points come from the user, (n_points,) bool, by default all. If such a point cannot be measured
    in the picture, that is an error. Other points, and points that cannot be measured on the reference, are left out.
    """
    picture, reference = pictures
    given = np.ones(len(points.x), bool) if given is None else given
    kernel, kept, lost = blur_kernel(sigma), ~points.on_isoline, np.zeros(len(points.x), bool)
    check_points(points, *picture.shape[:2], len(kernel) // 2)
    there = None if reference.is_aligned else reference.locate(points.centers)

    def measure(i):
        place = points.x[i], points.y[i]
        both = _measure_both(picture, reference.picture, place, kernel) if there is None else (
            _measure_unaligned(picture, reference.picture, (place, there[0][i], there[1][i]), (kernel, sigma)))
        if not all((np.abs(each) < 1e140).all() for each in both[1:]):
            raise Lost
        return both

    found = measure_each(points, measure)
    for i, each in found.items():
        if isinstance(each, Unusable):
            kept[i], lost[i] = False, isinstance(each, Lost)
            if given[i] and not lost[i]:
                raise RmgradientError(f'{points.describe([i])} {each}') from each
    kept = kept[points.leader]
    n_lost, all_lost = np.count_nonzero(given & ~kept), points.centers[lost]
    if len(np.unique(points.leader[kept])) < LEAST_PLACES and not kept.all():
        raise NotRegistered(f'only {kept.sum()} of {len(kept)} points have data in the picture and on the reference; '
                            f'give at least {LEAST_PLACES} such points')
    chosen = Chosen(np.count_nonzero(given & kept), np.count_nonzero(~given), True) if not given.all() else None
    points, old = points.subset(kept), np.flatnonzero(kept)
    measured = measured_from(points, {new: found[i][0] for new, i in enumerate(old) if i in found})
    levels, plain, ours = (np.array([found[old[i]][k] for i in points.leader]) for k in (1, 2, 3))
    same = all(getattr(picture, name) == getattr(reference.picture, name) for name in ('dtype', 'scale', 'zero'))
    return measured._replace(chosen=chosen, reference=ReferenceLevels(
        levels, plain, ours, reference.zero, same, n_lost, all_lost, reference.where))


class Lost(Unusable):
    """A place cannot be measured on the reference."""


@np.errstate(invalid='ignore', over='ignore')
def _measure_both(picture, reference, place, kernel):
    """Return a Window, the level of a registered reference, and both levels with stars, from the same pixels."""
    rows, columns = _around(picture, place, kernel)
    values, usable, narrow = _read_window(picture, rows, columns, kernel)
    theirs, also, _ = _read_window(reference, rows, columns, kernel)
    weights = narrow[:, None] * narrow
    if weights.sum(where=usable) >= LEAST_SHARE > weights.sum(where=usable & also):
        raise Lost
    usable = usable & also
    kept = _is_near_median(values, usable).all(axis=0) & _is_near_median(theirs, usable).all(axis=0) & usable
    share, window = _mean_of(values, usable, np.broadcast_to(kept, values.shape), narrow)
    check_window(share, window, kernel)
    level, plain, ours = ((weights * some * each).sum(axis=(1, 2)) / (weights * some).sum()
                          for some, each in ((kept, theirs), (usable, theirs), (usable, values)))
    return window, level, plain, ours


@np.errstate(invalid='ignore', over='ignore')
def _measure_unaligned(picture, reference, places, kernel_and_sigma):
    """As `_measure_both`, for a reference with other pixels.

    Takes the place in the picture, the place on the reference, and the (2, 2) derivatives of the map there. A star is
    left out of both windows if it is an outlier in one of them. If each window had its own outliers, errors would be
    twice as large or more.
    """
    (here, there, slopes), (kernel, sigma) = places, kernel_and_sigma
    rows, columns = _around(picture, here, kernel)
    values, usable, narrow = _read_window(picture, rows, columns, kernel)
    if not (np.isfinite(there).all() and np.isfinite(slopes).all()):
        raise Lost
    sigma = min(max(sigma * math.sqrt(abs(np.linalg.det(slopes))), 0.5), 1e5)  # at least half a pixel
    radius, middle = math.ceil(3 * sigma), np.rint(there)
    if not ((middle >= radius).all() and (middle + radius < reference.shape[1::-1]).all()):
        raise Lost
    (x, y), inside = middle.astype(int).tolist(), np.arange(-radius, radius + 1)
    theirs, also, thin = _read_window(reference, *(slice(at - radius, at + radius + 1) for at in (y, x)),
                                      np.ones(len(inside)))
    inside = inside[::-(-len(inside) // len(thin))]
    along_x, along_y = (np.exp(-0.5 * ((inside - shift) / sigma) ** 2) for shift in there - middle)
    weights = np.outer(along_y, along_x)
    if weights.sum(where=also) < LEAST_SHARE * weights.sum():
        raise Lost
    ours_kept, theirs_kept = (_is_near_median(a, b).all(axis=0) & b for a, b in ((values, usable), (theirs, also)))
    if len(narrow) == len(kernel) and len(thin) == 2 * radius + 1 and abs(np.linalg.det(slopes)) > 1e-9:
        back = np.linalg.inv(slopes)
        in_both = (ours_kept & _looked_up(theirs_kept, len(kernel) // 2, slopes, there - middle),
                   theirs_kept & _looked_up(ours_kept, radius, back, back @ (middle - there)))
        both_weights = np.outer(narrow, narrow), weights
        if all((w * kept).sum() >= LEAST_SHARE * w.sum() for w, kept in zip(both_weights, in_both)):
            ours_kept, theirs_kept = in_both
    share, window = _mean_of(values, usable, np.broadcast_to(ours_kept, values.shape), narrow)
    check_window(share, window, kernel)
    level, plain = ((weights * some * theirs).sum(axis=(1, 2)) / (weights * some).sum()
                    for some in (theirs_kept, also))
    all_of_ours = np.outer(narrow, narrow) * usable
    return window, level, plain, (all_of_ours * values).sum(axis=(1, 2)) / all_of_ours.sum()


def _looked_up(kept, radius, slopes, shift):
    """Look up an (n, n) bool window at the pixels of another window, by a linear map about the middles.

    Pixels outside the other window are True.
    """
    offsets = np.stack(np.meshgrid(*[np.arange(-radius, radius + 1)] * 2), axis=-1) @ slopes.T + shift
    x, y = np.rint(offsets).astype(int).transpose(2, 0, 1) + len(kept) // 2
    inside = (x >= 0) & (x < len(kept)) & (y >= 0) & (y < len(kept))
    return np.where(inside, kept[np.where(inside, y, 0), np.where(inside, x, 0)], True)


def references(picture, other):
    """Yield functions that register another Picture to a picture, and return a Reference.

    In this order: the same size and close stars; coordinates of both in the sky; patterns of stars; the same size
    without a test of the stars. A function that fails raises NotRegistered, or RmgradientError if a package is missing.
    """
    if other.shape[:2] == picture.shape[:2]:
        yield lambda: register_by_shift(picture, other.flipped if other.bottom_up != picture.bottom_up else other)
        if other.bottom_up != picture.bottom_up:
            yield lambda: register_by_shift(picture, other)
    if picture.has_wcs and other.has_wcs:
        yield lambda: register_by_wcs(picture, other)
    yield lambda: register_by_stars(picture, other)
    if other.shape[:2] == picture.shape[:2]:
        yield lambda: Reference(other)


def register_by_shift(picture, other):
    """Return the Reference of a picture of the same size, shifted if the stars in the middle are shifted."""
    ours, theirs = picture.stars_of_middle, other.stars_of_middle
    if min(len(ours), len(theirs)) < LEAST_STARS:
        return Reference(other)
    steps = (theirs - ours[:, None]).reshape(-1, 2)
    bins = np.rint(np.vstack([[0, 0], steps[(np.abs(steps) < MOST_SHIFT).all(axis=1)]]) / 2).astype(int)
    kinds, counts = np.unique(bins, axis=0, return_counts=True)
    start = np.vstack([np.eye(2), 2 * kinds[counts.argmax()]])
    pairs, matrix = refine_map(ours, theirs, start, MATCHED)
    corners = np.array(list(itertools.product((0, picture.shape[1]), (0, picture.shape[0]))), float)
    moved = np.hypot(*(mapped(corners, matrix) - corners).T)
    if len(pairs) < max(LEAST_STARS, 0.2 * min(len(ours), len(theirs))):
        raise NotRegistered('its stars are at other places than those of the picture; is it registered, and does it '
                            'show the same field?')
    if moved.max() < MOVED:
        return Reference(other, is_sure=True)
    where = f'shifted by up to {moved.max():.1f} pixels ({len(pairs)} stars)'
    return Reference(other, functools.partial(mapped, matrix=matrix), where)


def register_by_wcs(picture, other):
    """Return the Reference of a picture by the coordinates in the FITS headers of both."""
    ours, theirs = picture.wcs(), other.wcs()

    def locate(places):
        with np.errstate(all='ignore'):
            return np.stack(theirs.all_world2pix(*ours.all_pix2world(*places.T, 0), 0, quiet=True), axis=1)

    size = np.array(picture.shape[1::-1])
    at = locate(size * np.array([[0.5, 0.5], [0.25, 0.25], [0.75, 0.75]]))
    if not np.isfinite(at).all():
        raise NotRegistered('its coordinates (WCS) show another field')
    reference = Reference(other, locate)
    _, slopes = reference.locate(size[None] / 2.0)
    scale = math.sqrt(abs(np.linalg.det(slopes[0])))
    reference.where = f'registered by coordinates (WCS), magnified {scale:.4g} times'
    return reference


def register_by_stars(picture, other):
    """Return the Reference of a picture by its stars. It may be turned, scaled or mirrored.

    Triangles of the brightest stars give a start (astroalign; Beroiz, Cabral and Sanchez 2020, Astronomy and Computing
    32, 100384). Then all matching stars give an affine map.
    """
    try:
        import astroalign
    except ImportError as error:
        raise RmgradientError('is not registered; register it, or let the program do it after: '
                              f'{how_to_install("astroalign")}') from error
    ours, theirs = picture.stars, other.stars
    reach = MATCHED * bin_factor(*other.shape[:2])
    pairs, matrix = np.zeros((0, 2)), None
    for mirror in (1.0, -1.0):
        flip = np.array([mirror, 1.0])
        with contextlib.suppress(Exception):  # the library has several for too few stars or no match
            start, _ = astroalign.find_transform((ours * flip)[:BRIGHT], theirs[:BRIGHT])
            matrix = np.vstack([start.params[:2, :2].T * flip[:, None], start.params[:2, 2]])
            pairs, matrix = refine_map(ours, theirs, matrix, reach)
        if len(pairs) >= LEAST_STARS:
            break
    else:
        raise NotRegistered(f'its stars do not match those of the picture ({len(pairs)} of {len(ours)} and '
                            f'{len(theirs)} found); does it show the same field?')
    (a, b), (c, d) = matrix[:2]
    scale, angle = math.sqrt(abs(a * d - b * c)), round(math.degrees(math.atan2(b, a)), 2) + 0.0
    mirrored = ', mirrored' if a * d < b * c else ''
    middle = np.array([*picture.shape[1::-1], 2.0]) / 2 @ matrix
    where = (f'registered by {len(pairs)} stars, magnified {scale:.4f} times, turned by {angle:.2f} degrees{mirrored}, '
             f'middle at ({middle[0]:.0f}, {middle[1]:.0f})')
    return Reference(other, functools.partial(mapped, matrix=matrix), where)


def refine_map(ours, theirs, matrix, reach):
    """Return the index pairs of matching stars, (n, 2), and their (3, 2) affine map, starting from another map.

    All matching stars are fitted, so any close start gives the same map. The start of astroalign is random.
    """
    from scipy.spatial import KDTree
    tree, places = KDTree(theirs), np.hstack([ours, np.ones((len(ours), 1))])
    for times in (3, 2, 1, 1, 1):
        distance, nearest = tree.query(places @ matrix)
        near = np.flatnonzero(distance < times * reach)
        if len(near) < LEAST_STARS:
            break
        matrix = np.linalg.lstsq(places[near], theirs[nearest[near]], rcond=None)[0]
    return np.stack([near, nearest[near]], axis=1), matrix


def bin_factor(height, width):
    """Return the binning factor for the search of stars."""
    return max(1, -(-max(height, width) // BINNED))


def mapped(places, matrix):
    """Apply a (3, 2) affine map to (n, 2) places."""
    return places @ matrix[:2] + matrix[2]


@np.errstate(all='ignore')  # huge values
def find_stars(picture, rows=None, columns=None):
    """Return the (n_stars, 2) coordinates of the brightest stars of a window, the brightest first.

    Memory: a float64 array of at most `BINNED` x `BINNED` pixels, and some strips.
    """
    from scipy.ndimage import gaussian_filter, maximum_filter
    rows, columns = rows or slice(0, picture.shape[0]), columns or slice(0, picture.shape[1])
    width, height = columns.stop - columns.start, rows.stop - rows.start
    factor = bin_factor(height, width)

    @np.errstate(all='ignore')  # in each thread
    def binning(start, stop):
        values, usable = picture.usable(slice(rows.start + start, rows.start + stop), columns)
        gray = np.where(usable, values.mean(axis=2, dtype=float), 0)
        total, number = (np.pad(each, ((0, -len(gray) % factor), (0, -width % factor))).reshape(
            -1, factor, -(-width // factor), factor).sum(axis=(1, 3)) for each in (gray, usable))
        return np.where(number > 0, total / np.maximum(number, 1), np.nan)

    groups = row_groups(height, factor * max(1, ROWS // factor))
    gray = np.concatenate(list(picture.starmap(binning, groups)))
    known = np.isfinite(gray)
    gray = np.where(known, gray, np.median(gray[known]) if known.any() else 0)
    sharp = gaussian_filter(gray, 1.0) - gaussian_filter(gray, 4.0)
    above = sharp > STAR * robust_std(sharp[known]) if known.any() else known
    is_peak = above & (sharp == maximum_filter(sharp, 5)) & known
    is_peak[[0, -1]] = is_peak[:, [0, -1]] = False
    y, x = np.nonzero(is_peak)
    order = np.argsort(-sharp[y, x], kind='stable')[:MOST_STARS]
    y, x = y[order], x[order]
    # The maximum of a parabola through three pixels.
    places = []
    for at, (before, behind) in ((x, (sharp[y, x - 1], sharp[y, x + 1])), (y, (sharp[y - 1, x], sharp[y + 1, x]))):
        bend = 2 * sharp[y, x] - before - behind
        places.append(at + (behind - before) / (2 * np.where(bend > 0, bend, np.inf)))
    return factor * (np.stack(places, axis=1) + 0.5) - 0.5 + [columns.start, rows.start]


def check_reference(shape, reference_shape):
    """Raise RmgradientError unless a reference has the channels of the picture, or one channel."""
    n_channels = reference_shape[2]
    if n_channels not in (1, shape[2]):
        raise RmgradientError(f'has {n_channels} channels and the picture {shape[2]}; '
                              'give a gray one or the same')


# ---- Automatic points ----------------------------------------------------------------------------

AUTO = 15  # cells along the longer side: each offers one point
MOST_CELLS = 30  # along the longer side: more take minutes
# Quiet places
LEAST_USABLE = 0.75  # fraction of the pixels of a window that must be usable
SMOOTH = 0.04  # of the variance of the calmest tenth: windows with less were filled by a program
# Consensus
FIRST_STEPS, MOST_STARTS = 3, 10  # after FIRST_STEPS steps, only the MOST_STARTS best starts are continued
DEGREES = range(1, 9)  # of the polynomials: higher degrees would follow nebulae
AGREES = 1.3  # times the 99 % quantile of chi-squared: closer places are on the surface
DROPPED = 5.0  # largest cost of a place: with 8, surfaces follow nebulae; with 3, too few places remain
BELOW = 4.0  # standard deviations: a place farther below the surface costs more, since little is darker than the sky
LEAST_VARIANCE = 0.25  # of the levels about the surface, in squares of their noise: less does not improve the score
MOST_SCATTER_OF_ALL = 4.2  # noises: if scatter / (fraction of places that is sky) is larger, places do not agree
# Places that the consensus leaves out
NEIGHBORS = 1.7  # cells: closer places are neighbors, also diagonally
RIM = 0.4  # a place with a larger fraction of its neighbors off the surface is on the rim of a nebula
GROUP = 3  # so many neighbors off the surface are a nebula or the end of a glow; fewer are stars
CORNER = 6  # places: a smaller group in a corner is the end of a glow
MOST_END, ROUGH = 0.2, 6.0  # fraction of places, typical errors: a larger or rougher group is not the end of a glow
GLOW_LEFT = 0.2  # of the excess: residuals of a glow in a corner are smaller; those of nebulae are a third or more
FALLS = 0.97  # of the squared excess: a falling curve explains more of a glow, and at most 0.89 of a nebula
STANDS_OUT, JOINS, FAINT = 7.0, 5.5, 1.5  # typical errors: to leave out, to take back, to leave out near a nebula
# Places that do not agree
WEIGHT_ABOVE = 0.03  # weight of places above the low surface: with 0.1, it runs through nebulae
LOWEST = 0.25  # fraction of the places that count as sky then
PLANAR = 6.0  # a cubic must fit so many times better than a plane
STIFF = {1: 3.0, 3: 0.8}  # least shape by degree, over the longer side, so that the model does not follow nebulae
# Points of the user (certain points)
LEAST_GIVEN = 5  # from which others can grow: fewer do not predict each other
AS_PREDICTED, ROUNDS = 2.0, 30  # typical errors within which a place joins, and largest number of rounds
MOST_SCATTER = 4.0  # noises: if the grown sky scatters more, it does not agree
# If a larger fraction than MOST_BELOW of the certain points is more than FAR_BELOW noises below the sky of the others,
# that sky is a nebula. On a steep glow, half of them can be below an oscillating model.
FAR_BELOW, MOST_BELOW = 6.0, 0.75


class Sites(NamedTuple):
    """Places that may be sky."""

    points: Points
    levels: np.ndarray  # (n_places, n_channels), data units
    noise: np.ndarray  # (n_channels,): median standard error of the levels, at least the rounding error
    certain: np.ndarray  # (n_places,) bool: given by the user
    size: np.ndarray  # width and height of the frame
    cell: float  # side of a cell, in pixels

    def subset(self, kept):
        """Return the places where kept, (n_places,) bool, is True."""
        return self._replace(points=self.points.subset(kept), levels=self.levels[kept], certain=self.certain[kept])

    def from_certain(self):
        """Return the (n_places,) distances from the nearest certain point."""
        return distances_from(self.points.centers, self.certain)

    def from_border(self):
        """Return the (n_places, 2) distances from the nearer border in x and y."""
        return np.minimum(self.points.centers, self.size - self.points.centers)

    def neighbors(self):
        """Return which places are neighbors, (n_places, n_places) bool, False on the diagonal."""
        return distances_among(self.points.centers) < NEIGHBORS * self.cell


@np.errstate(over='ignore')  # as in `significance`
def choose_points(image: ArrayLike | Picture, n: int = AUTO, sigma: float = SIGMA,
                  given: Points | None = None) -> Measured:
    """Choose points of empty sky, and measure them.

    Parameters
    ----------
    image : (height, width, n_channels) or (height, width) array_like, or a Picture
        It is read once in strips. Then the windows around the points are read.
    n : int
        Cells of a grid along the longer side, 3 to 30. Each cell offers one point. Cells at the border, and next to
        areas without data, offer up to four.
    sigma : float
        Standard deviation of the Gaussian blur at the points, in pixels.
    given : Points or (n_points, 2) array_like, optional
        Points that are certainly sky. They come first, all are kept, and the surface goes through them.

    Returns
    -------
    Measured
        The points, their levels and noise. `Measured.chosen` tells how they were chosen.

    Raises
    ------
    RmgradientError
        If n or sigma is out of range, a given point cannot be measured, or there are too few places without structure.

    Notes
    -----
    Each cell offers its quietest place. A glow is smooth to the noise, and a nebula is not. So the sky is the largest
    set of places that agree on one smooth surface. If there is no such set, a nebula or a galaxy fills the frame. Then
    the points get a least shape, so that the surface does not follow the nebula. docs/method.rst has the details.
    """
    picture = as_picture(image)
    points, is_given = join_quiet_places(picture, n, sigma, given)
    measured, is_given = measure_places(picture, points, (sigma, True), is_given)
    points, levels, noise = measured.points, measured.levels, np.median(measured.noise, axis=0)
    noise = with_rounding(noise, picture, points, sigma)
    rounding = 1e-9 * np.abs(levels).max(axis=0) + TINY
    varies = np.ptp(levels, axis=0) > rounding  # a constant channel has no information
    varies |= not varies.any()
    noise, size = np.maximum(noise, rounding)[varies], np.array(picture.shape[1::-1])
    sites = Sites(points, levels[:, varies], noise, is_given, size, size.max() / n)
    with one_blas_thread:
        sky = choose_sky(sites)
    is_sky = sky.is_sky & (is_given | (sites.from_certain() > 2 * sigma))
    chosen = Chosen(np.count_nonzero(is_given), np.count_nonzero(~is_given), bool(sky.agree))
    measured = measured.subset(is_sky)
    return measured._replace(points=measured.points._replace(least_shape=sky.least_shape), chosen=chosen)


def join_quiet_places(picture, n, sigma, given):
    """Return Points of given points and quiet places, and which are given, (n_points,) bool."""
    if not (isinstance(n, numbers.Integral) and 3 <= n <= MOST_CELLS):
        raise RmgradientError(f'a grid of {n} cells along the longer side is not from 3 to {MOST_CELLS}')
    given = unchecked_points([]) if given is None else as_points(given, least=1)
    places = find_quiet_places(picture, n, Settings(sigma=sigma).sigma)
    if len(given.x) + len(places) < LEAST_PLACES:
        raise RmgradientError(f'too few quiet places with data, {len(places)}; use a finer grid, a smaller '
                              'sigma, or give points')
    indices = np.arange(len(given.x) + len(places))
    is_given = indices < len(given.x)
    sources = given.sources and (*given.sources, *[''] * len(places))
    points = Points(*np.hstack([given[:3], [*places.T, indices[~is_given]]]), sources, is_chosen=len(places) > 0)
    return points, is_given


def measure_places(picture, points, sigma_and_robust, is_given):
    """Return Measured of given points and of the other places that can be measured, and which are given.

    Raises RmgradientError if a given point cannot be measured.
    """
    windows, kept = windows_of(picture, points, *sigma_and_robust), np.ones(len(points.x), bool)
    for i, window in windows.items():
        if isinstance(window, Unusable):
            if is_given[i]:
                raise RmgradientError(f'{points.describe([i])} {window}') from window
            kept[i] = False
    if kept.sum() < LEAST_PLACES:
        raise RmgradientError(f'only {kept.sum()} of {len(kept)} quiet places have data; use a finer grid or a smaller '
                              'sigma, or give points')
    new = np.cumsum(kept) - 1
    windows = {new[i]: window for i, window in windows.items() if kept[i]}
    return measured_from(points.subset(kept), windows), is_given[kept]


class SkyPlaces(NamedTuple):
    """Which places are sky."""

    is_sky: np.ndarray  # (n_places,) bool
    agree: bool  # they agree on one smooth surface
    least_shape: float = 0.0  # of the model through them, pixels


def choose_sky(sites):
    """Return the SkyPlaces of places, some of which may be certain.

    If few points are certain, they take part in the consensus. Otherwise they are compared with the sky of the other
    places. If that sky agrees, and they are not far below it, they are added to it. If not, the sky grows from the
    certain points, provided that the result agrees.
    """
    certain = sites.certain
    n_given = (certain & ~sites.points.on_isoline).sum()
    if n_given < LEAST_GIVEN or (~certain).sum() < 2 * LEAST_PLACES:  # too few to compare both
        return sky_of(sites)
    others = sky_of(sites.subset(~certain))
    is_sky = certain.copy()
    is_sky[~certain] = others.is_sky
    if others.agree and not contradicts_certain(is_sky & ~certain, certain, sites):
        return others._replace(is_sky=is_sky)
    with contextlib.suppress(RmgradientError):  # too few places of sky
        grown = follow_model(grow_from_certain(sites), sites)
        if (robust_std(grown.model.errors) < MOST_SCATTER * sites.noise).all():
            return SkyPlaces(leave_faint_ends(grown, sites), True)
    return others._replace(is_sky=is_sky, agree=False)


def sky_of(sites):
    """Return the SkyPlaces of places: their consensus, corrected where it is known to fail.

    The ends of glows are taken back. The rims of rejected groups are left out. Then places that stand out above the
    adaptive model are left out, and peaks of glows are taken back. If the places scatter too much about the consensus,
    a nebula or a galaxy fills the frame: see `lower_sky`. The limit is lower if fewer places are sky.
    """
    certain = sites.certain
    is_sky, scatter = find_consensus(sites)
    agree = is_sky[certain].all()
    ends, glow = ends_of_glows(is_sky | certain, sites)
    is_sky = is_sky | certain | ends
    followed = follow_model(is_sky & ~rims(is_sky, sites) | certain | glow, sites, glow)
    # Places that stand out in a corner may be the peak of a glow whose flanks were on the surface.
    _, peak = ends_of_glows(followed.is_sky, sites)
    if peak.any():
        followed = follow_model(followed.is_sky | peak, sites, glow | peak)
    is_sky = leave_faint_ends(followed, sites)
    return SkyPlaces(is_sky, agree) if scatter < MOST_SCATTER_OF_ALL * is_sky.mean() else lower_sky(sites)


def contradicts_certain(is_sky, certain, sites):
    """Whether most certain places are far below the model through the sky of others."""
    if is_sky.sum() < LEAST_PLACES:
        return True
    errors, _ = predict_others(fit_sites(is_sky, sites), sites, is_sky)
    below = (errors / sites.noise).mean(axis=1)[certain[~is_sky]] < -FAR_BELOW
    return below.mean() > MOST_BELOW


def lower_sky(sites):
    """Return the SkyPlaces of places that are mostly on a nebula: the lowest places, with a stiff surface.

    If a nebula or a galaxy fills the frame, the largest set that agrees includes both sky and structure. But nebulae
    are bright, so the sky is below. Asymmetric least squares find a low surface without choosing a set (expectiles;
    Newey and Powell 1987, Econometrica 55, 819): places above the surface have a small weight. The surface is a plane,
    unless a cubic fits much better. The model goes through the `LOWEST` places. A large least shape keeps it from
    following structure.
    """
    levels, surfaces = sites.levels / sites.noise, {}
    for degree in STIFF:
        terms = legendre_terms(2 * sites.points.centers / sites.size - 1, degree)
        if degree == 1 or len(terms) >= 2.5 * terms.shape[1]:
            residuals = asymmetric_residuals(terms, levels)
            surfaces[degree] = residuals, (asymmetry_of(residuals) * residuals**2).mean()
    is_planar = 3 not in surfaces or surfaces[1][1] < PLANAR * surfaces[3][1]
    degree = 1 if is_planar else 3
    residuals, _ = surfaces[degree]
    is_low = residuals <= np.sort(residuals)[max(LEAST_PLACES, round(LOWEST * len(residuals))) - 1]
    return SkyPlaces(is_low | sites.certain, False, STIFF[degree] * sites.size.max())


def asymmetry_of(residuals):
    """Return the weights of asymmetric least squares."""
    return np.where(residuals > 0, WEIGHT_ABOVE, 1 - WEIGHT_ABOVE)


def asymmetric_residuals(terms, levels):
    """Fit terms to levels by asymmetric least squares. Return the (n_places,) residuals, summed over the channels."""
    weights = np.ones(len(levels))
    for _ in range(50):
        root = np.sqrt(weights)[:, None]
        residuals = (levels - terms @ np.linalg.lstsq(terms * root, levels * root, rcond=None)[0]).sum(axis=1)
        before, weights = weights, asymmetry_of(residuals)
        if (weights == before).all():
            break
    return residuals


def places_with_reference(picture, n, sigma, given=None):
    """Return Points of given points and all quiet places of a picture, and which are given."""
    points, is_given = join_quiet_places(picture, n, sigma, given)
    kept = is_given | (distances_from(points.centers, is_given) > 2 * sigma)
    return points.subset(kept), is_given[kept]


def with_rounding(noise, picture, points, sigma):
    """Return the (n_channels,) noise of levels, or the rounding error if that is larger than the noise of pixels."""
    radius, pixel_noise = math.ceil(3 * sigma), noise * 2 * math.sqrt(math.pi) * sigma
    measured = points.subset(~points.on_isoline)
    rows = [picture[y:y + 1, x - radius:x + radius + 1][0] for x, y in zip(measured.x, measured.y)]
    with np.errstate(invalid='ignore', over='ignore'):
        differences = np.abs(np.diff(np.array(rows, float), axis=1)).reshape(-1, picture.shape[2])
    # The smallest difference of neighboring pixels is the rounding step, whatever the scale of the picture is.
    step = differences.min(axis=0, where=differences > 0, initial=np.inf)
    step[np.isinf(step)] = 0
    return np.where(pixel_noise < step / 2, step / math.sqrt(12), noise)


def find_consensus(sites):
    """Find the largest set of places that agree on one smooth surface within the noise.

    Returns which places are sky, (n_places,) bool, and the standard deviation of their levels about the surface, in
    units of their noise.

    This is a trimmed regression, similar to least trimmed squares and the minimum covariance determinant (Rousseeuw
    and Van Driessen 1999, Technometrics 41, 212; 2006, Data Mining and Knowledge Discovery 12, 29). Surfaces are
    polynomials of several degrees. The starts are all places, and the half or three quarters of the places that are
    farthest from each of 6 x 6 centers. One of these centers is inside a nebula.

    Let r be residuals, S their covariance and d = r' S^-1 r. Concentration steps keep the half with the smallest d.
    Later steps keep all places that agree. The best set has the highest score, a log-likelihood minus the penalty of
    the Bayesian information criterion (BIC). For n places i with weights v_i, k terms and c channels,

        score = -sum_i v_i [min(d_i / 2, DROPPED) + (1 if r_i < -BELOW deviations in some channel)]
                - n / 2 log det S - k c / 2 log n.

    So no place costs more than `DROPPED`, or one more below the surface, since little is darker than the sky. Certain
    points have together the weight of half of the places, and cost ten times as much off the surface.
    """
    n_places, certain = len(sites.levels), sites.certain
    places, levels = 2 * sites.points.centers / sites.size - 1, sites.levels / sites.noise
    weights = np.where(certain, max(1, n_places / 2 / max(1, certain.sum())), 1.0)
    costs = np.where(certain, 10 * DROPPED, DROPPED)
    starts = [np.ones(n_places)]
    for center in itertools.product(np.linspace(-1, 1, 6), repeat=2):
        distance = np.hypot(*((places - center) * sites.size).T)
        starts += [(distance > np.quantile(distance, part)).astype(float) for part in (0.25, 0.5)]

    def best_of(degree):
        return concentrate(Surfaces(legendre_terms(places, degree), levels, weights), np.array(starts), costs)

    degrees = [d for d in DEGREES if n_places >= 1.25 * (d + 1) * (d + 2)]  # 2.5 times as many as terms
    return max(in_two_threads(best_of, degrees), key=lambda each: each[0])[1:]


def concentrate(surfaces, sets, costs):
    """Refine candidate sets of places, (n_sets, n_places). Return score, members and scatter of the best set."""
    n_places, n_channels = surfaces.levels.shape
    limit = AGREES * chi_squared_quantile(n_channels)
    least = int(min(max(n_places / 2, 1.5 * surfaces.n_terms + n_channels), n_places))
    for step in range(10):
        _, covariance, distances = surfaces.fit(sets)
        before, sets = sets, nearest(distances, least)
        if step == FIRST_STEPS:
            sets = sets[np.argsort(np.linalg.slogdet(covariance)[1])[:MOST_STARTS]]
        elif step > FIRST_STEPS and (sets == before).all():
            break
    for step in range(10):
        # The half that is closest to a surface scatters less than all of its places.
        distances = surfaces.fit(sets)[2] / (1.5 if step == 0 else 1)
        before, sets = sets, np.where(distances < limit, 1.0, 0.0)
        few = sets.sum(axis=1) < least
        sets[few] = nearest(distances[few], least)
        if step and (sets == before).all():
            break
    residuals, covariance, distances = surfaces.fit(sets)
    scatter = np.sqrt(np.trace(covariance, axis1=1, axis2=2))
    below = residuals.min(axis=2) < -BELOW * scatter[:, None]
    score = -(np.minimum(distances / 2, costs) + below) @ surfaces.weights
    score -= n_places / 2 * np.linalg.slogdet(covariance)[1]
    score -= surfaces.n_terms * n_channels / 2 * math.log(n_places)
    i = score.argmax()
    return score[i], sets[i] > 0, scatter[i] / math.sqrt(n_channels)


class Surfaces:
    """Weighted least squares of the same terms and levels on many sets of places at once.

    Takes (n_places, n_terms) terms, (n_places, n_channels) levels in units of their noise, and (n_places,) weights.
    """

    def __init__(self, terms, levels, weights):
        self.n_terms, self.levels, self.weights, self._terms = terms.shape[1], levels, weights, terms
        # A set is a vector of ones and zeros. Its product with these arrays gives its normal equations.
        n_places, weighted = len(terms), terms * weights[:, None]
        self._normal = (weighted[:, :, None] * terms[:, None]).reshape(n_places, -1)
        self._known = (weighted[:, :, None] * levels[:, None]).reshape(n_places, -1)

    def fit(self, sets):
        """Return residuals, their covariances, and squared distances of (n_sets, n_places) ones and zeros.

        Shapes (n_sets, n_places, n_channels), (n_sets, n_channels, n_channels) and (n_sets, n_places).
        """
        n_sets, n_terms, n_channels = len(sets), self.n_terms, self.levels.shape[1]
        normal = (sets @ self._normal).reshape(n_sets, n_terms, n_terms)
        ridge = 1e-8 / n_terms * np.trace(normal, axis1=1, axis2=2)  # a set may not determine all terms
        normal += ridge[:, None, None] * np.eye(n_terms)
        coefficients = np.linalg.solve(normal, (sets @ self._known).reshape(n_sets, n_terms, n_channels))
        residuals = self.levels - self._terms @ coefficients
        n_kept = sets.sum(axis=1)
        n_free = np.maximum(n_kept - n_terms, 1)  # a start may have no more places than terms
        kept = residuals * (sets / n_free[:, None])[..., None]
        covariance = kept.transpose(0, 2, 1) @ residuals
        # The second part is needed if all channels are equal and huge.
        least = LEAST_VARIANCE + 1e-12 * np.trace(covariance, axis1=1, axis2=2)
        covariance += least[:, None, None] * np.eye(n_channels)
        return residuals, covariance, ((residuals @ np.linalg.inv(covariance)) * residuals).sum(axis=2)


def legendre_terms(places, degree):
    """Return (n_places, n_terms) products of Legendre polynomials up to a degree, at places in -1 ... 1."""
    x, y = (np.polynomial.legendre.legvander(t, degree) for t in places.T)
    return np.stack([x[:, i] * y[:, j] for i in range(degree + 1) for j in range(degree + 1 - i)], axis=1)


def chi_squared_quantile(n):
    """Return the 99 % quantile of chi-squared with n degrees of freedom (Wilson, Hilferty 1931, PNAS 17, 684)."""
    return n * (1 - 2 / (9 * n) + 2.326 * math.sqrt(2 / (9 * n))) ** 3


def nearest(distances, n):
    """Return sets of the n places with the smallest distances, (n_sets, n_places), as ones and zeros."""
    sets = np.zeros_like(distances)
    np.put_along_axis(sets, np.argpartition(distances, n - 1, axis=1)[:, :n], 1.0, axis=1)
    return sets


def grow_from_certain(sites):
    """Return which places are sky, (n_places,) bool, starting from the certain ones.

    The adaptive model through the sky predicts the other places and its own error (kriging). Where the error is
    smallest, places that agree with the prediction join the sky. Then the model is fitted again and all places are
    tested again.
    """
    is_sky, least = sites.certain, MISFIT * sites.noise
    for _ in range(ROUNDS):
        model = fit_sites(is_sky, sites)
        off, deviation = np.zeros((2, len(is_sky)))
        off[is_sky] = np.abs(significance(model.errors, model.standardized, least)).max(axis=1)
        may_join = is_sky.copy()
        if not is_sky.all():
            errors, deviation[~is_sky] = predict_others(model, sites, is_sky)
            standardized = errors / deviation[~is_sky, None]
            off[~is_sky] = np.abs(significance(errors, standardized, least, model.standardized)).max(axis=1)
            may_join |= deviation <= np.quantile(deviation[~is_sky], 0.3)
        before, is_sky = is_sky, sites.certain | (off < AS_PREDICTED) & may_join
        if (is_sky == before).all():
            break
    return is_sky


def rims(is_sky, sites):
    """Return which places have many neighbors off the surface."""
    neighbors = sites.neighbors()
    return (neighbors & ~is_sky).sum(axis=1) > RIM * neighbors.sum(axis=1)


def groups_off(is_sky, sites):
    """Return connected groups of places off the surface, each as (n_places,) bool, the smallest first."""
    joined = sites.neighbors() & ~is_sky & ~is_sky[:, None]
    group = np.where(is_sky, -1, np.arange(len(is_sky)))
    while (group != (group := np.maximum(group, np.where(joined, group, -1).max(axis=1)))).any():
        pass
    return sorted((group == i for i in np.unique(group[~is_sky])), key=np.sum)


def ends_of_glows(is_sky, sites):
    """Find places off the surface that are the ends of glows: polynomials cannot follow these.

    A group in a corner is the glow of an amplifier or a lamp if it is small, or if the adaptive model predicts its
    places well from the others. A group is also a glow if its excess depends only on the distance from a corner or a
    border, and falls with it. Other small groups at the border are ends of glows if they do not stand out from the
    adaptive model: a glow is smooth to the noise, and a nebula is not.

    Returns two (n_places,) bool ndarrays: all ends, and the certain ones, which are never left out later.
    """
    all_sky, glow, at_border = is_sky, np.zeros(len(is_sky), bool), sites.from_border() < sites.cell
    excess = np.zeros(len(is_sky))
    if not is_sky.all():
        errors, _ = predict_others(fit_sites(is_sky, sites), sites, is_sky)
        excess[~is_sky] = (errors / sites.noise).sum(axis=1)
    for group in groups_off(is_sky, sites):
        both, size = all_sky | group, group.sum()
        in_corner = at_border[group].all(axis=1).any()
        if GROUP <= size <= MOST_END * len(is_sky) and at_border[group].any():
            model = fit_sites(both, sites)
            left = (model.errors / sites.noise).sum(axis=1)[group[both]]
            is_predicted = in_corner and (left**2).sum() < GLOW_LEFT**2 * (excess[group] ** 2).sum()
            if is_predicted or falls_from_border(excess[group], sites.points.centers[group], sites.size):
                all_sky, glow = both, glow | group
            elif np.abs(model.standardized / robust_std(model.standardized))[group[both]].max() < ROUGH:
                all_sky = both
        if size <= CORNER and in_corner:
            all_sky = all_sky | group
    return all_sky & ~is_sky, glow


def falls_from_border(excess, centers, size):
    """Whether an excess, (n,) at (n, 2) centers, only depends on the distance from a corner or border, and falls."""
    if len(excess) < CORNER:
        return False
    excess = excess * np.sign(excess.sum())
    corners = size * np.array(list(itertools.product((0, 1), repeat=2)))
    distances = [*distances_between(corners, centers), *centers.T, *(size - centers).T]
    return any(falling_part(excess[np.argsort(distance, kind='stable')]) > FALLS for distance in distances)


def falling(values):
    """Return the falling sequence closest to values: isotonic regression by pooling adjacent violators."""
    blocks = []
    for value in values.tolist():
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.repeat([mean for mean, _ in blocks], [n for _, n in blocks])


def falling_part(values):
    """Return the fraction of the squared values that the closest falling sequence explains."""
    return 1 - ((values - falling(values)) ** 2).sum() / ((values**2).sum() + TINY)


class Followed(NamedTuple):
    """Sky that agrees with the adaptive model through it."""

    is_sky: np.ndarray  # (n_places,) bool
    model: AdaptiveModel  # through these places
    errors: np.ndarray  # (n_others, n_channels): level minus prediction at the other places, data units


def follow_model(is_sky, sites, glow=False):
    """Leave out places that stand out above the adaptive model through the others. Take back the peaks of glows.

    Polynomials do not follow the peak of a glow at the border. A bright place there is taken back, once, if the model
    predicts it to be brighter than nine in ten of the accepted places. Certain glows never stand out. Returns Followed.
    """
    at_border = sites.from_border().min(axis=1) < 2 * sites.cell
    brightness, tried = (sites.levels / sites.noise).sum(axis=1), np.zeros(len(is_sky), bool)
    least = MISFIT * sites.noise
    while True:
        model = fit_sites(is_sky, sites)
        stand_out = (excess_of_sky(model, is_sky, sites, least) > STANDS_OUT) & ~np.asarray(glow)
        if stand_out.any():
            is_sky = is_sky & ~stand_out
            continue
        errors, deviation = predict_others(model, sites, is_sky)
        off = significance(errors, errors / deviation[:, None], least, model.standardized)
        predicted = brightness[~is_sky] - (errors / sites.noise).sum(axis=1)
        joins = np.zeros(len(is_sky), bool)
        joins[~is_sky] = (np.abs(off).max(axis=1) < JOINS) & (predicted > np.quantile(brightness[is_sky], 0.9))
        joins &= at_border & ~tried
        if not joins.any():
            return Followed(is_sky, model, errors)
        is_sky, tried = is_sky | joins, tried | joins


def leave_faint_ends(followed, sites):
    """Return the sky of Followed without the faint outskirts of nebulae.

    Inside the frame, near a bright group, a small excess is enough to leave a place out.
    """
    is_sky, model, errors = followed
    nebulae = np.zeros(len(is_sky), bool)
    for group in groups_off(is_sky, sites):
        nebulae |= group & (group.sum() >= GROUP)
    nebulae[~is_sky] &= (errors / sites.noise).sum(axis=1) > 0
    is_near = distances_from(sites.points.centers, nebulae) < 2.5 * sites.cell
    may_be_faint = is_near & (sites.from_border().min(axis=1) > sites.cell)
    while (faint := (excess_of_sky(model, is_sky, sites, sites.noise) > FAINT) & may_be_faint).any():
        is_sky = is_sky & ~faint
        model = fit_sites(is_sky, sites)
    return is_sky


def fit_sites(is_sky, sites):
    """Return the AdaptiveModel through some of the places."""
    if is_sky.sum() < (LEAST_GIVEN if sites.certain.sum() >= LEAST_GIVEN else LEAST_PLACES):
        raise RmgradientError(f'too few places of empty sky, {is_sky.sum()}; give points')
    return choose_model(sites.points.subset(is_sky), sites.levels[is_sky])


def excess_of_sky(model, is_sky, sites, least):
    """Return the leave-one-out error of each place of the sky, positive if too bright, in typical errors.

    Errors up to the least error, (n_channels,) in data units, count as 0. So do errors of certain places.
    """
    excess = np.zeros(len(is_sky))
    excess[is_sky] = significance(model.errors, model.standardized, least).max(axis=1)
    excess[sites.certain] = 0
    return excess


def predict_others(model, sites, is_sky):
    """Return level minus prediction at the places that are not sky, (n_others, n_channels), and its standard deviation.

    Prediction and variance are those of kriging, see `krige`. The standard deviation is (n_others,). The quotient is a
    standardized error as in `left_out_errors`.
    """
    centers = sites.points.centers
    shares, variance = krige(model, centers[is_sky], centers[~is_sky])
    errors = sites.levels[~is_sky] - shares.T @ sites.levels[is_sky]
    return errors, np.sqrt(np.maximum(variance + model.smooth, 1e-12))


def find_quiet_places(picture, n, sigma):
    """Return the (n_places, 2) place of least variance in each cell of a grid, n cells along the longer side.

    The variance is that of windows of 2 x 2 tiles. A tile is as wide as the radius of the blur. Windows with too few
    usable pixels are left out, and so are windows that are too smooth to be exposed.
    """
    height, width, _ = picture.shape
    tile = max(8, len(blur_kernel(sigma)) // 2)
    if min(height, width) <= 2 * tile:
        return np.empty((0, 2), int)
    # Tiles have equal size, to a pixel, so that windows reach the border on all sides.
    edges = [np.round(np.linspace(0, n, n // tile + 1)).astype(int) for n in (width, height)]
    total, squares, number = survey_tiles(picture, edges)
    variance, is_good = variance_of_windows(total, squares, number, edges)
    # The middle of a window is between two pixels. We take the one closer to the middle of the frame, and in the middle
    # the one on the calmer side. So a mirrored picture gets mirrored points.
    x, y = np.meshgrid(*(each[1:-1] for each in edges))
    noisier = sides_of_windows(squares, total, number)
    x = x - (2 * x > width) - ((2 * x == width) & noisier[0])
    y = y - (2 * y > height) - ((2 * y == height) & noisier[1])
    windows = Windows(np.minimum(x, width - 1 - tile), np.minimum(y, height - 1 - tile), variance, is_good)
    return quietest_of_cells(windows, np.array([width, height]), n)


class Windows(NamedTuple):
    """Windows of 2 x 2 tiles."""

    x: np.ndarray  # (n_down, n_across) int: middle, where the level would be measured
    y: np.ndarray
    variance: np.ndarray  # (n_down, n_across, n_channels) of their pixels
    is_good: np.ndarray  # (n_down, n_across) bool: enough pixels can be measured


def survey_tiles(picture, edges):
    """Return the sums of values and of squares in tiles, (n_down, n_across, n_channels), and the number of pixels.

    Only usable pixels count. The edges are those of the tiles in x and y. Memory: 20 bytes for each tile and channel,
    and a row of tiles in float64 for each worker.
    """
    _, width, n_channels = picture.shape
    x_edges, y_edges = edges

    def surveying(start, stop):
        values, usable = picture.usable(slice(start, stop), slice(0, width))
        with np.errstate(invalid='ignore', over='ignore'):  # signaling NaN, huge values
            values = values.reshape(len(values), -1).astype(float)
            if usable.all():
                number = np.diff(x_edges) * len(values)
            else:
                values = np.where(np.repeat(usable, n_channels, axis=1), values, 0)
                number = np.add.reduceat(usable.sum(axis=0), x_edges[:-1])
            # Rows are summed first: sums over the short last axes are slow.
            return *(np.add.reduceat(sums.reshape(width, n_channels), x_edges[:-1])
                     for sums in (values.sum(axis=0), np.einsum('ij,ij->j', values, values))), number.astype(np.int32)

    tiles = list(picture.starmap(surveying, list(zip(y_edges[:-1].tolist(), y_edges[1:].tolist()))))
    return [np.array(each) for each in zip(*tiles)]


@np.errstate(invalid='ignore', over='ignore', divide='ignore')
def sides_of_windows(squares, total, number):
    """Return whether the right half, and the lower half, of windows of 2 x 2 tiles varies more than the other half."""
    noisier = []
    for axis in (1, 0):
        halves = []
        for side in (slice(None, -1), slice(1, None)):
            a, b, n = (each[side] if axis == 0 else each[:, side] for each in (squares, total, number[..., None]))
            a, b, n = (each[:, 1:] + each[:, :-1] if axis == 0 else each[1:] + each[:-1] for each in (a, b, n))
            halves.append((a / n - (b / n) ** 2).sum(axis=2))
        noisier.append(halves[1] > halves[0])
    return noisier


@np.errstate(invalid='ignore', over='ignore', divide='ignore')
def variance_of_windows(total, squares, number, edges):
    """Return the variance of windows of 2 x 2 tiles, and whether they are good, see `Windows`."""
    total, squares, number = (a[1:, 1:] + a[1:, :-1] + a[:-1, 1:] + a[:-1, :-1] for a in (total, squares, number))
    mean = total / number[..., None]
    variance = squares / number[..., None] - mean**2
    variance[variance < 1e-12 * mean**2] = 0  # rounding
    width, height = (each[2:] - each[:-2] for each in edges)
    return variance, (number >= LEAST_USABLE * np.outer(height, width)) & np.isfinite(variance).all(axis=2)


def quietest_of_cells(windows, size, n):
    """Return the center of the quietest window in each cell, (n_places, 2), n cells along the longer side of a frame.

    Glows, vignetting and haze above land are steepest at borders. So the outermost windows are cells of their own, and
    so are the windows in corners. The variance of each channel is in units of its median.
    """
    x, y, variance, is_good = windows
    if not is_good.any():
        return np.empty((0, 2), int)
    typical = np.median(variance[is_good], axis=0)
    structure = (variance / np.maximum(typical, TINY)).sum(axis=2)
    calm = [np.quantile(some, 0.1) if (some := each[each > 0]).size and middle > 0 else 0
            for each, middle in zip(variance[is_good].T, typical)]
    good = is_good & (variance >= SMOOTH * np.array(calm)).all(axis=2) & np.isfinite(structure)
    n_across, n_down = np.maximum(1, np.round(size * n / size.max())).astype(int)
    cell = (2 * y + 1) * n_down // (2 * size[1]) * n_across + (2 * x + 1) * n_across // (2 * size[0])
    # On which side of a window there is no other good one: 1 before, 2 after, 3 both.
    padded = np.pad(is_good, 1)
    end_x = 2 * ~padded[1:-1, 2:] + ~padded[1:-1, :-2]
    end_y = 2 * ~padded[2:, 1:-1] + ~padded[:-2, 1:-1]
    chosen = []
    for kind, where in ((0 * end_x, good), (end_x, good & (end_x > 0)), (end_y, good & (end_y > 0)),
                        (4 * end_x + end_y, good & (end_x > 0) & (end_y > 0))):
        key, quiet = (16 * cell + kind)[where], structure[where]
        order = np.lexsort([quiet, key])
        chosen.append(np.flatnonzero(where)[order[np.unique(key[order], return_index=True)[1]]])
    chosen = np.unique(np.concatenate(chosen))
    return np.stack([x.ravel()[chosen], y.ravel()[chosen]], axis=1)


# ---- Sky level -----------------------------------------------------------------------------------

LIKE = 4.0  # factor: frames of one field have more similar levels

def find_sky(fit: Fit, picture: Picture, settings: Settings) -> np.ndarray:
    """Return the level of the corrected sky, (n_channels,) in data units.

    Parameters
    ----------
    fit : Fit
    picture : Picture
        The picture to correct: its size, type and scale are used.
    settings : Settings
        Its `sky` is

        - 'gray': the median level of the points, averaged over the channels, for all channels;
        - 'color': the median level of each channel, so that the sky keeps its average color;
        - 'darkest': the lowest background of each channel in the frame;
        - a number, or one for each channel;
        - None: with a reference of the same type, its level, so that all frames of a field get the same level, unless
          it is more than `LIKE` times larger or smaller. Otherwise 'darkest' for the classic model; 'color' to divide,
          since gray would change the colors of stars; and 'gray' in all other cases.

    Raises
    ------
    RmgradientError
        If the level is outside the range of the picture. To divide, if the level or the background is 0 or less.
    """
    sky, median = settings.sky, np.median(fit.measured.levels, axis=0)
    reference = fit.measured.reference
    if sky is None and reference and is_level_like(reference, median):
        sky = picture.physical(np.broadcast_to(reference.zero, median.shape))
    if sky is None:
        sky = 'darkest' if fit.adaptive is None else 'color' if settings.method == 'divide' else 'gray'
    if not isinstance(sky, str):
        check_sky(sky, picture)
        level = np.broadcast_to((np.asarray(sky, float) - picture.zero) / picture.scale, median.shape).copy()
    elif sky == 'darkest':
        level = find_darkest(fit.model, picture, settings.rows)
    else:
        level = median if sky == 'color' else np.full_like(median, median.mean())
    if np.abs(level).max() > 1e9 * np.abs(median).max() > 0:
        raise RmgradientError(f'a sky level of {in_words(picture.physical(level))} is too far from that of the '
                              f'picture, {in_words(picture.physical(median))}')
    if settings.method == 'divide':
        check_divisor(fit.model, picture, settings.rows)
        if (picture.physical(level) <= 0).any():
            raise RmgradientError('to divide, the sky needs a level above 0, not '
                                  f'{in_words(picture.physical(level))}')
    return level


def is_level_like(reference, levels):
    """Whether the level of a reference is similar to that of the picture. A stretched reference is far from it."""
    return reference.is_same_type and bool(((reference.zero < LIKE * levels) & (levels < LIKE * reference.zero)).all())


def find_darkest(model, picture, rows=ROWS):
    """Return the lowest background of each channel in the frame, (n_channels,) in data units."""
    def evaluating(start, stop):
        blocks = model.blocks(start, stop, picture.shape[1])
        return np.min([block.min(axis=0).min(axis=0) for _, _, block in blocks], axis=0)

    return np.min(list(picture.each_strip(evaluating, rows)), axis=0)


def check_sky(sky, picture):
    """Raise RmgradientError if a sky level has other channels than the picture, or does not fit in its integers."""
    if sky is None or isinstance(sky, str):
        return
    values = np.atleast_1d(sky)
    if len(values) not in (1, picture.shape[2]):
        raise RmgradientError(f'{len(values)} sky levels for a picture of {picture.shape[2]} channels')
    if picture.dtype.kind in 'ui':
        lowest, highest = picture.physical([float(limit) for limit in range_of(picture.dtype)])
        if values.min() < lowest or values.max() > highest:
            raise RmgradientError(f'a sky level of {in_words(values)} is not in the range of the picture, '
                                  f'{lowest:.0f} to {highest:.0f}')


def check_divisor(model, picture, rows):
    """Raise RmgradientError unless the background is positive everywhere, in physical units."""
    model = model.above(np.full(model.n_channels, -picture.zero / picture.scale))

    def lowest_of(start, stop):
        blocks = model.blocks(start, stop, picture.shape[1])
        return min(((block.min(), rows.start + start, columns.start, block) for rows, columns, block in blocks
                    if block.min() <= 0), key=lambda each: each[0], default=None)

    dark = [each for each in picture.each_strip(lowest_of, rows) if each]
    if dark:
        lowest, top, left, block = min(dark, key=lambda each: each[0])
        y, x, _ = np.unravel_index(block.argmin(), block.shape)
        raise RmgradientError(f'the background is {lowest * picture.scale:g} at {(left + int(x), top + int(y))}, so '
                              'dividing by it is not possible; add a point there, or subtract')


# ---- Correction ----------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Correction:
    """A fitted background, and how it is removed from a picture.

    The corrected pixels, by `settings.method`, are

    - 'subtract': picture - (background - sky);
    - 'stretch': sky + (picture - background) * (white - sky) / (white - background), so that white stays white;
    - 'divide': picture * sky / background.
    """
    # No other class rounds and limits. In the classic stretch (`Settings.is_classic`), the sky level is 0.

    fit: Fit
    sky: np.ndarray  # (n_channels,): level of the corrected sky, data units
    picture: Picture  # the picture that was measured: its type, blank value and scale are used
    settings: Settings
    misfits: list[tuple[int, float]]  # points that do not fit, see `find_misfits`
    findings: tuple[Finding, ...] = ()  # warnings and remarks, the most important first
    verdict: Finding = Finding('fit', 'fit: not judged')  # quality of the fit and its expected error

    def __repr__(self) -> str:
        return (f'<Correction: {self.points!r}, {self.settings.method}, sky level {in_words(self.sky)}, '
                f'{len(self.findings)} findings, {self.verdict.text}>')

    @property
    def points(self) -> Points:
        """The points of the model."""
        return self.fit.measured.points

    @property
    def levels(self) -> np.ndarray:
        """Levels of the background at the points, (n_points, n_channels), in data units."""
        return self.fit.measured.levels

    @property
    def model(self) -> BackgroundModel:
        """The background: `model.evaluate(0, height, width)`."""
        return self.fit.model

    @property
    def white(self) -> float:
        """The value of white, in data units. By default, the largest integer, or 1.0 for floats."""
        if self.settings.white is not None:
            return (self.settings.white - self.picture.zero) / self.picture.scale
        return range_of(self.picture.dtype)[1] if self.picture.dtype.kind in 'ui' else 1.0

    def apply(self, image: ArrayLike | Picture, start: int = 0) -> np.ndarray:
        """Return a picture without its background.

        Parameters
        ----------
        image : (n_rows, width, n_channels) or (n_rows, width) array_like, or a Picture
            Rows of the picture that was measured, or of another picture of the same width.
        start : int
            Row of the frame that is the first row of the image.

        Returns
        -------
        ndarray
            Shape and dtype are those of the image, in native byte order. Integers are rounded to nearest and limited
            to their range. Floats are not limited: negative values and NaN stay.

        Raises
        ------
        RmgradientError
            If the image has other channels or another width than the correction, or start is not the number of a row.
            To stretch, if the background is as bright as white.

        Warns
        -----
        RmgradientWarning
            If many pixels became black or white.
        """
        picture = as_picture(image)
        height, width, n_channels = picture.shape
        if n_channels != self.model.n_channels:
            raise RmgradientError(f'{n_channels} channels, and the correction is for {self.model.n_channels}')
        if width != self.picture.shape[1]:
            raise RmgradientError(f'{width} pixels wide, and the correction is for {self.picture.shape[1]}')
        if not (isinstance(start, numbers.Integral) and 0 <= int(start) < 2**31):
            raise RmgradientError(f'start is {start!r}, not the number of a row')
        start = int(start)
        corrected, counts = np.empty(picture.shape, picture.dtype), np.zeros(3, int)
        for first, last in row_groups(height, self.settings.rows):
            strip, n_limited = self.corrected_strip(picture, first, last, start)
            corrected[first:last] = strip[..., :n_channels]
            counts[:2] += n_limited
        warn(check_limits(self, picture, counts))
        corrected = corrected[..., 0] if not getattr(picture, 'has_channels', True) else corrected
        return np.ma.array(corrected, mask=image.mask) if is_masked_array(image) else corrected

    def corrected_strip(self, picture, first, last, start=0):
        """Return rows first to last - 1 of a picture without background. Its first row is row start of the frame.

        Extra samples stay as they are. So do values that are not finite or blank, and pixels that are transparent or
        without data (except in the classic way). No other value becomes blank. Returns all samples, and the numbers of
        pixels with a channel that became the smallest and the largest integer, see `newly_limited`.
        """
        strip, n_channels = picture.read(first, last), self.model.n_channels
        color, n_limited, dtype = strip[..., :n_channels], np.zeros(2, int), (strip.dtype, picture.blank)
        untouched = np.zeros(strip.shape[:2], bool)
        if not self.settings.is_classic:
            untouched = picture.untouched(strip, slice(first, last), slice(0, strip.shape[1]))
        kept, above, uncounted = strip[untouched], self.model.above(self.sky), untouched
        if picture.mask is not None:
            uncounted = untouched | picture.is_masked(slice(first, last), slice(0, strip.shape[1]))
        noise = self.dither_noise(0, start + first, color.shape) if self.settings.dither else None
        for rows, columns, shift in above.blocks(start + first, start + last, strip.shape[1]):
            before = color[rows, columns]
            with np.errstate(all='ignore'):  # infinite pixels, and signaling NaN
                if self.settings.method == 'stretch':
                    self.check_white(shift)
                after = self.leveled(before, shift)
                after, is_limited = to_range(after, dtype, noise[rows, columns] if self.settings.dither else None)
                is_blank = before == picture.blank if picture.blank is not None else False
                if is_limited:
                    n_limited += newly_limited(before, after, dtype, (uncounted[rows, columns, None] | is_blank))
                np.copyto(before, after, casting='unsafe', where=~np.asarray(is_blank))
        strip[untouched] = kept
        return strip, n_limited

    def leveled(self, values, shift):
        """Return float64 values without background, neither rounded nor limited.

        Shift is the background minus the sky level, float64 in data units. It may be overwritten.
        """
        if self.settings.method == 'subtract':
            return np.subtract(values, shift, out=shift)
        if self.settings.method == 'divide':
            offset = self.picture.zero / self.picture.scale  # values plus this are proportional to physical ones
            sky = self.sky + offset
            return (values + offset) * (sky / (shift + sky)) - offset
        sky = 0 if self.settings.is_classic else self.sky
        background = shift + sky
        return (values - background) / (self.white - background) * (self.white - sky) + sky

    def check_white(self, shift):
        """Raise RmgradientError if the background is as bright as white."""
        background = (shift + (0 if self.settings.is_classic else self.sky)).max()
        if background >= self.white:
            white, background = self.picture.physical([self.white, background])
            raise RmgradientError(f'to stretch, white has to be brighter than the background: it is {white:g}, and the '
                                  f'background is up to {background:g}')

    def background_strip(self, picture, start, stop):
        """Return rows of the background in the dtype of the picture, and how many pixels do not fit in its range."""
        background = self.model.evaluate(start, stop, picture.shape[1])
        noise = self.dither_noise(1, start, background.shape) if self.settings.dither else None
        n_unfit = count_unfit(background, picture.dtype)
        with np.errstate(over='ignore'):  # a huge value becomes infinite
            background, _ = to_range(background, (picture.dtype, picture.blank), noise)
            return background.astype(picture.dtype), n_unfit

    def dither_noise(self, stream, start, shape):
        """Return noise for rows from start on, uniform in -0.5 ... 0.5, of the shape (n_rows, width, n_channels).

        Each row has its own generator, so that the result does not depend on threads and groups of rows. Its seed
        includes the levels at the points, so that the noise averages out in a stack of pictures. Stream: 0 for the
        picture, 1 for its background.
        """
        key = zlib.crc32(np.ascontiguousarray(self.levels))
        rows = range(start, start + shape[0])
        return np.stack([np.random.default_rng([key, stream, row]).random(shape[1:]) for row in rows]) - 0.5


def range_of(dtype, blank=None):
    """Return the smallest and the largest float64 of an integer dtype, without the value of no data."""
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    lowest, highest = float(lowest + (lowest == blank)), highest - (highest == blank)
    # 2^64 - 1 is not a float64.
    return lowest, math.nextafter(float(highest), 0) if float(highest) > highest else float(highest)


def to_range(values, dtype_and_blank, noise=None):
    """Dither, round and limit float64 values to the range of an integer dtype. Floats are not changed.

    No value becomes blank, the value of no data. Integers are made in place. Returns the values, and whether some are
    the smallest or the largest integer, or floats outside 0 ... 1.
    """
    dtype, blank = dtype_and_blank
    if np.dtype(dtype).kind == 'f':
        return values, values.min() < 0 or values.max() > 1
    if noise is not None:
        values += noise
    np.rint(values, out=values)
    lowest, highest = range_of(dtype, blank)
    is_limited = values.min() <= lowest or values.max() >= highest
    if is_limited:  # usually not: the test takes half of the time of limiting all values
        np.clip(values, lowest, highest, out=values)
    if blank is not None:
        values[values == blank] += 1
    return values, is_limited


def newly_limited(before, after, dtype_and_blank, uncounted):
    """Count the pixels with a channel that became the smallest, and the largest integer.

    For floats, count those that became less than 0, and more than 1. After: float64 values of `to_range`. Uncounted:
    bool, broadcast with both.
    """
    if np.dtype(dtype_and_blank[0]).kind == 'f':
        lowest, highest = -TINY, math.nextafter(1, 2)
    else:
        lowest, highest = range_of(*dtype_and_blank)
    return np.array([np.count_nonzero((new & ~uncounted).any(axis=2))
                     for new in ((after <= lowest) & (before > lowest), (after >= highest) & (before < highest))])


def count_unfit(values, dtype):
    """Count the pixels with a channel outside the range of an integer dtype."""
    if np.dtype(dtype).kind == 'f':
        return 0
    limits = np.iinfo(dtype)
    if limits.min <= values.min() and values.max() <= limits.max:
        return 0
    return np.count_nonzero(((values < limits.min) | (values > limits.max)).any(axis=2))


# ---- Check of the result -------------------------------------------------------------------------

NINTHS = 'upper left', 'top', 'upper right', 'left', 'middle', 'right', 'lower left', 'bottom', 'lower right'
NO_SKY = 'set your own points on empty sky with --edit, mask other areas with --mask, or use a --reference'
LEAST_SPAN = 0.06  # of the area of the picture: with less, most of the background is extrapolated
LEAST_LIMITED = 0.1  # percent of the pixels
LEAST_NOISE = 1e-4  # of the sky level: only drawn pictures have less noise
# Expected errors
COARSE = 3  # every third tile
UNCERTAIN_AUTO, UNCERTAIN = 2.5, 1.2  # true over predicted errors, for automatic and for given points
UNSURE = 1.2  # noises: with a larger expected error, a ninth of the frame gets a warning
GOOD, POOR = 0.15, 0.6  # noises: limits of the expected error
SCATTERED = 5.0  # noises of levels: if points agree better than this, the reason for an error is that they are few
REASONS = {'step': 'there is a step', 'filled': 'there is no smooth sky', 'structure': 'it follows structure',
           'corner': 'a corner stays', 'edge': 'an edge stays', 'part': 'a part of the frame is uncertain'}
# Residuals of tiles, in noises of a pixel. The limits are set so that good results give no finding. See
# docs/measurements.rst for how many defects each rule finds.
LEAST_EDGE, EDGE_DEPTH = 0.5, 5  # noises; an edge of up to so many tiles is compared with as many tiles inside
LEAST_TILES = 2 * EDGE_DEPTH + 2  # across the picture
REACHED = 0.1  # of the longer side: the background follows an edge or a corner if points are so close
UNEVEN = 0.45  # of the median of an edge: four in five of its tiles differ from it by less
SHARE = 0.85  # of the jumps along a step: at least so many have the same sign
SCATTERS = 2.0  # smallest height of a step over the scatter of its jumps
OTHERS = 10.0  # smallest height of a step over the jumps on parallel lines
RAMP = -0.9, 0.35  # slopes beside a step, over its height: larger ones are a bend, smaller ones the rebound of a fit
LEAST_CORNER = 0.8  # noises: smallest rise towards a corner
EXPLAINED = 0.85  # smallest fraction of the squared rise that the distance from the corner explains
NARROW = 0.13  # of the longer side: largest half width of a rise
FINE, FINE_PART = 0.3, 0.14  # smallest structure of a model: noises, and fraction of the scatter of the background
FINE_SHAPE = 3.0  # average distances between points: models with a larger shape have no structure


class StepRule(NamedTuple):
    """Conditions for a line of jumps to be a step."""

    least: float  # height, noises
    even: float  # smallest fraction of the height in each quarter of the line
    slopes: np.ndarray  # rows per column, tiles


STRAIGHT, PART = StepRule(0.4, 0.6, np.zeros(1)), StepRule(0.8, 0.75, np.zeros(1))
SLANTED = StepRule(0.8, 0.6, np.linspace(-1, 1, 61))  # with 17 slopes, three of 24 slanted steps are found


def find_edge(a):
    """Return the height of an edge along the first row of (n, m) levels, and its number of rows, or (0.0, 0)."""
    a = a[:2 * EDGE_DEPTH + 2]
    good = np.isfinite(a).all(axis=0)
    if good.sum() < max(8, 0.6 * len(good)):
        return 0.0, 0
    a = a[:, good] - np.median(a[EDGE_DEPTH:, good], axis=0)
    off = float(np.median(a[0]))
    if abs(off) < LEAST_EDGE or np.quantile(np.abs(a[0] - off), 0.8) > UNEVEN * abs(off):
        return 0.0, 0
    inside = np.abs(np.median(a, axis=1)) < 0.2 * abs(off)
    return off, int(inside.argmax()) if inside.any() else len(a)


def find_step(a):
    """Return height, row, slope and part of the sharpest step along a line across (n, m) levels, or height 0.0.

    The line follows a row, is slanted by a slope, or covers only the first (part -1) or last (part 1) half or third.
    """
    bend = (a[1:-3] - a[:-4]) + (a[4:] - a[3:-1])
    jump = a[3:-1] - a[1:-3] - bend  # between the rows before and after, without the slopes on both sides
    m = jump.shape[1]
    found = [(*step_along(jump, bend, STRAIGHT), 0)]
    # A slanted line has a step only if most columns have a jump.
    if not found[0][0] and max((sign * jump >= SLANTED.least).any(axis=0).mean() for sign in (-1, 1)) >= 0.7:
        found.append((*step_along(jump, bend, SLANTED), 0))
    if not any(each[0] for each in found):
        for part, columns in ((-1, slice(0, m // 2)), (1, slice(m // 2, m)), (-1, slice(0, m // 3)),
                              (1, slice(-(m // 3), m))):
            found.append((*step_along(jump[:, columns], bend[:, columns], PART), part))
    height, row, slope, part = max(found, key=lambda each: abs(each[0]))
    return height, row + 2, slope, part


def step_along(jump, bend, rule):
    """Return height, row and slope of the sharpest step of a rule along a line of (n, m) jumps, or height 0.0.

    Along the line, the jumps have the same sign and height, and parallel lines have none. The slopes on both sides are
    smaller, since it is not a bend.
    """
    best, score, (n, m) = (0.0, 0, 0.0), 0.0, jump.shape
    if m < 8:
        return best
    lines = _lines_of(n, m, len(rule.slopes))
    jump, bend = (np.vstack([each, np.full(m, np.nan)]) for each in (jump, bend))  # the last row is outside
    known, sign = np.isfinite(jump).astype(np.int8), np.sign(np.nan_to_num(jump)).astype(np.int8)
    number, total = (each.ravel()[lines].sum(axis=2, dtype=np.int16) for each in (known, sign))
    jump, bend = jump.ravel(), bend.ravel()
    # Few lines pass this test. So medians cost little.
    for k, i in np.argwhere((number > 0.6 * m) & (np.abs(total) >= (2 * SHARE - 1) * number)):
        line = lines[k, i][np.isfinite(jump[lines[k, i]])]
        values, height = jump[line], float(np.median(jump[line]))
        even = min(np.median(part) for part in np.array_split(values / height, 4))
        if abs(height) < max(rule.least, SCATTERS * robust_std(values - height)) or even < rule.even or (
                even * abs(height) <= score):
            continue
        parallel = lines[k][np.abs(np.arange(n) - i) > 3]
        others = 1.4826 * np.median(np.abs(known_medians(jump[parallel])))
        ramp = np.median(bend[line]) / height
        if abs(height) >= OTHERS * others and RAMP[0] < ramp <= RAMP[1]:
            best, score = (height, int(i), float(rule.slopes[k])), even * abs(height)
    return best


def known_medians(values):
    """Return the median of the values of each row that are not NaN, and 0 if all are."""
    values = np.sort(values, axis=1)  # NaN comes last
    n = np.isfinite(values).sum(axis=1)
    row = np.arange(len(values))
    middle = values[row, np.maximum(n - 1, 0) // 2] + values[row, np.minimum(n // 2, values.shape[1] - 1)]
    return np.where(n > 0, middle / 2, 0)


@functools.lru_cache(maxsize=64)
def _lines_of(n, m, n_slopes):
    """Return the (n_slopes, n, m) indices of lines in raveled (n + 1, m) values. Pixels outside are in the last row."""
    column = np.arange(m)
    slopes = (SLANTED if n_slopes > 1 else STRAIGHT).slopes[:, None, None]
    rows = np.arange(n)[:, None] + np.rint(slopes * (column - (m - 1) / 2)).astype(np.int32)
    return np.where((rows >= 0) & (rows < n), rows, n) * m + column


def find_corner(a, x, y):
    """Return height and half width of a rise of (n, m) levels towards a corner, or (0.0, 0.0).

    x and y are distances of columns and rows from the corner, over the longer side. The glow of an amplifier or a lamp
    depends only on the distance from the corner. A nebula does not.
    """
    distance, known = np.hypot(x, y[:, None]), np.isfinite(a)
    near, ring, inside = distance < 0.05, (distance > 0.2) & (distance < 0.32), known & (distance < 0.25)
    if (known & near).sum() < max(1, 0.7 * near.sum()) or (known & ring).sum() < max(1, 0.6 * ring.sum()):
        return 0.0, 0.0
    base = np.median(a[known & ring])
    rise = np.median(a[known & near]) - base
    if abs(rise) < LEAST_CORNER:
        return 0.0, 0.0
    order = np.argsort(distance[inside], kind='stable')
    r, values = distance[inside][order], np.sign(rise) * (a[inside][order] - base)
    fitted = falling(values)
    reach = 3 * robust_std(values - fitted)  # limits the influence of stars
    fitted = falling(np.clip(values, fitted - reach, fitted + reach))
    explained = 1 - ((values - fitted) ** 2).sum() / (values**2).sum()
    half = r[min(np.searchsorted(-fitted, -0.4 * fitted[:3].mean()), len(r) - 1)]
    return (float(rise), float(half)) if explained >= EXPLAINED and half <= NARROW else (0.0, 0.0)


class Leftover(NamedTuple):
    """Residuals in the tiles of a corrected picture."""

    levels: np.ndarray  # (n_down, n_across, n_channels), in noises of a pixel; NaN without data
    background: np.ndarray  # the background that was removed, in the same units
    tiles: Tiles
    noise: np.ndarray  # (n_channels,): of a pixel, data units
    picture: Picture

    def strongest(self, find):
        """Return find(levels) of the channel with the largest first value, and that channel."""
        found = [(*find(self.levels[..., i]), i) for i in range(self.levels.shape[2])]
        return max(found, key=lambda each: abs(each[0]))

    def side(self, axis, is_end):
        """Return the name of a side of the displayed picture, by axis and end."""
        return ('top', 'bottom')[is_end != self.picture.bottom_up] if axis == 0 else ('left', 'right')[is_end]

    def box(self, axis, start, stop):
        """Return left, top, right, bottom of a strip of rows (axis 0) or columns."""
        height, width, _ = self.picture.shape
        start, stop = max(0, round(start)), round(stop)
        return (0, start, width, min(stop, height)) if axis == 0 else (start, 0, min(stop, width), height)

    def words(self, noises, channel):
        """Return a height, given in noises, as text in physical units with 'brighter' or 'darker'."""
        return f'{rounded(noises * self.noise[channel] * self.picture.scale)} {"brighter" if noises > 0 else "darker"}'


def check_leftover(leftover, points):
    """Return Findings for edges, steps and corners that remain in the result, unless the picture is too small.

    If no points are near, the surface can cause such edges. If a nebula fills the frame, it reaches edges, too.
    """
    if min(leftover.levels.shape[:2]) < LEAST_TILES:
        return []
    findings = _find_defects(leftover)
    if points.least_shape:
        return [each for each in findings if each.kind == 'step']
    reach = REACHED * max(leftover.picture.shape[:2])
    for i, finding in enumerate(findings):
        if finding.kind != 'step':
            x0, y0, x1, y1 = finding.places[0]
            near = ((points.x >= x0 - reach) & (points.x < x1 + reach) & (points.y >= y0 - reach)
                    & (points.y < y1 + reach))
            if near.sum() < (3 if finding.kind == 'edge' else 1):
                findings[i] = finding._replace(advice='add points of empty sky near there')
    return findings


def _find_defects(leftover):
    """Return Findings for edges, steps and corners."""
    edges, steps = check_edges(leftover), []
    for axis in (0, 1):
        height, row, slope, part, channel = leftover.strongest(lambda a, axis=axis: find_step(a if axis == 0 else a.T))
        if height:
            steps += describe_step(leftover, edges, (axis, height, row, slope, part, channel))
    if len(steps) == 2 and any(each.numbers['slope'] for each in steps):  # one slanted step, found along both axes
        steps = [max(steps, key=lambda each: abs(each.numbers['noises']))]
    return steps or [*edges.values(), *check_corners(leftover, edges)]


def check_edges(leftover):
    """Return {side: Finding} for edges that fall or rise along their whole length."""
    edges = {}
    for axis, is_end in itertools.product((0, 1), (False, True)):
        inward = slice(None, None, -1 if is_end else 1)
        off, n_rows, channel = leftover.strongest(lambda a, axis=axis, inward=inward: find_edge(
            (a if axis == 0 else a.T)[inward]))
        if off:
            n, side = n_rows * leftover.tiles.side, leftover.side(axis, is_end)
            edges[side] = edge_finding(leftover, (axis, is_end, n), off, channel)
    return edges


def edge_finding(leftover, place, noises, channel):
    """Return the Finding for an edge. Its place is (axis, whether it is at the end, width in pixels)."""
    axis, is_end, n = place
    size, side, lines = leftover.picture.shape[axis], leftover.side(axis, is_end), ('rows', 'columns')[axis]
    box = leftover.box(axis, size - n, size) if is_end else leftover.box(axis, 0, n)
    text = f'the outermost {n} {lines} at the {side} are {leftover.words(noises, channel)} than those inside'
    return Finding('edge', text, 'crop them, or correct the flat', places=(box,),
                   numbers={'noises': noises, 'side': side, 'pixels': n})


def describe_step(leftover, edges, found):
    """Return the Findings for a step. A step close to a border is added to the edges: the strip should be cropped."""
    axis, height, row, slope, part, channel = found
    place, size = (leftover.tiles.y, leftover.tiles.x)[axis][row], leftover.picture.shape[axis]
    is_end, longer = bool(place > size / 2), max(leftover.picture.shape[:2])
    side, inside = leftover.side(axis, is_end), size - place if is_end else place
    if side in edges and inside < 0.12 * longer and abs(height) < 0.7 * abs(edges[side].numbers['noises']):
        return []  # the inner end of an edge
    if part and inside < 0.12 * longer:
        return []  # a bright object at the border
    if inside < 0.08 * longer and not slope and not part:
        edges[side] = edge_finding(leftover, (axis, is_end, round(inside)), height if is_end else -height, channel)
        return []
    line = 'yx'[axis]
    where = f'a line that is slanted at {line} = {place:.0f}' if slope else f'{line} = {place:.0f}'
    if part:
        where += f', in the {leftover.side(1 - axis, part > 0)} half'
    counts = rounded(height * leftover.noise[channel] * leftover.picture.scale)
    text = f'a step of {"-" if height < 0 else ""}{counts} along {where}, which no smooth background removes'
    box = leftover.box(axis, place - leftover.tiles.side, place + leftover.tiles.side)
    return [Finding('step', text, 'stack with normalization, or crop', places=(box,), numbers={
        'noises': height, 'slope': slope, 'pixel': float(place), 'part': float(place / size)})]


def check_corners(leftover, edges):
    """Return Findings for glows in corners, unless an edge was found there."""
    (height, width, _), findings = leftover.picture.shape, []
    longer = max(height, width)
    for is_low, is_right in itertools.product((False, True), repeat=2):
        vertical, horizontal = leftover.side(0, is_low), leftover.side(1, is_right)
        if {vertical, horizontal} & set(edges):
            continue
        x, y = (abs(centers - is_end * size) / longer for centers, is_end, size in
                ((leftover.tiles.x + 0.5, is_right, width), (leftover.tiles.y + 0.5, is_low, height)))
        rise, half, channel = leftover.strongest(lambda a, x=x, y=y: find_corner(a, x, y))
        if rise:
            n, name = round(half * longer), f'{ {"top": "upper", "bottom": "lower"}[vertical]} {horizontal}'
            box = (width - n if is_right else 0, height - n if is_low else 0, width if is_right else n,
                   height if is_low else n)
            findings.append(Finding(
                'corner', f'the {name} corner stays {leftover.words(rise, channel)}, which no point follows',
                'crop it, or correct the single frames (darks, flats)', places=(box,),
                numbers={'noises': rise, 'corner': name, 'pixels': n}))
    return findings


def expected_errors(fit, places_x, places_y, noise):
    """Return the expected error of the background on a grid, (n_y, n_x), in noises of a pixel.

    This is the standard deviation of kriging (Cressie 1993, Statistics for Spatial Data, section 3.4), scaled by the
    leave-one-out errors. A factor from drawn skies corrects it, since automatic points are chosen to agree.
    """
    x, y = np.meshgrid(places_x, places_y)
    _, variance = krige(fit.adaptive, fit.model.centers, np.stack([x.ravel(), y.ravel()], axis=1))
    usual = np.sqrt(((fit.adaptive.standardized / noise) ** 2).mean())
    factor = UNCERTAIN_AUTO if fit.measured.points.is_chosen else UNCERTAIN
    return factor * usual * np.sqrt(variance).reshape(x.shape)


def check_structure(fit, leftover):
    """Return the Finding for a model that follows structure, that is, bends between neighboring points."""
    centers, background = fit.model.centers, leftover.background
    n_down, n_across, n_channels = background.shape
    if fit.adaptive.epsilon >= FINE_SHAPE * average_spacing(centers):
        return []
    x, y = np.meshgrid(np.linspace(-1, 1, n_across), np.linspace(-1, 1, n_down))
    known = np.isfinite(leftover.levels).all(axis=2)
    terms = legendre_terms(np.stack([x[known], y[known]], axis=1), 5)
    values = background[known]
    if len(terms) < 2 * terms.shape[1]:
        return []
    residuals = values - terms @ np.linalg.lstsq(terms, values, rcond=None)[0]
    fine = np.sqrt((residuals**2).mean())
    if fine <= max(FINE, FINE_PART * np.sqrt(values.var(axis=0).mean())):
        return []
    text = f'the background follows structure of {fit.adaptive.epsilon:.0f} pixels, and takes it from nebulae and dust'
    advice = 'use a reference in the same colors, or points on empty sky' if fit.reference else NO_SKY
    return [Finding('structure', text, advice, numbers={'noises': float(fine), 'pixels': fit.adaptive.epsilon})]


def ninths_of(x, y, picture):
    """Return the index in `NINTHS` of places in the displayed picture."""
    height, width, _ = picture.shape
    row, column = (3 * y // height).astype(int), (3 * x // width).astype(int)
    return 3 * (2 - row if picture.bottom_up else row) + column


def check_parts(errors, leftover):
    """Return the Finding for ninths of the frame where the expected errors, at every `COARSE`-th tile, are large."""
    ninth = ninths_of(*np.meshgrid(leftover.tiles.x[::COARSE], leftover.tiles.y[::COARSE]), leftover.picture)
    unsure = {}
    for i, name in enumerate(NINTHS):
        here = errors[(ninth == i) & np.isfinite(errors)]
        if here.size >= 6 and (error := np.sqrt((here**2).mean())) > UNSURE:
            unsure[name] = error
    if not 0 < len(unsure) <= 4:
        return []
    names = sorted(unsure, key=unsure.get, reverse=True)
    counts = rounded(unsure[names[0]] * leftover.noise.mean() * leftover.picture.scale)
    text = f'the background at the {", ".join(names)} is uncertain by {counts}'
    numbers = {name: float(unsure[name]) for name in names}
    return [Finding('part', text, 'add points of empty sky there', numbers=numbers)]


def check_lost(points, lost, picture):
    """Return the Finding for ninths of the frame without data on the reference: their (n, 2) places are all lost."""
    kept, gone = (np.bincount(ninths_of(*each.T, picture), minlength=9) for each in (points.centers, lost))
    parts = [name for name, n, n_lost in zip(NINTHS, kept, gone) if n == 0 and n_lost >= 2]
    if not parts:
        return []
    text = f'the reference has no data at the {", ".join(parts)}, where the background is extrapolated'
    return [Finding('part', text, 'crop the picture, or use another reference', numbers=dict.fromkeys(parts))]


def check_filled(points):
    """Return the Finding for a frame full of nebula, where the surface is stiff, see `lower_sky`."""
    if not points.least_shape:
        return []
    return [Finding('filled', 'no smooth background fits (nebula, galaxy, Milky Way or a step?)', NO_SKY)]


def check_span(points, picture):
    """Return the Finding for points that cover only a small part of the frame."""
    angles = np.linspace(0, 2 * np.pi, 256, endpoint=False)  # the farthest in these directions are the hull
    x, y = points.centers[(points.centers @ [np.cos(angles), np.sin(angles)]).argmax(axis=0)].T
    part = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2 / math.prod(picture.shape[:2])
    if part >= LEAST_SPAN:
        return []
    text = f'the points span {100 * part:.2g} % of the picture, and outside them the background is a guess'
    return [Finding('span', text, 'spread them into the corners', numbers={'part': float(part)})]


def check_below_zero(fit, leftover, sigma):
    """Return the Finding for a background that falls below 0, although no level does."""
    background = leftover.picture.physical(leftover.background * leftover.noise)
    y, x, _ = np.unravel_index(background.argmin(), background.shape)
    if not background.min() < 0 < leftover.picture.physical(fit.measured.levels).min():
        return []
    margin = math.ceil(3 * sigma)  # points cannot be closer to the border
    place = tuple(int(np.clip(round(each), min(margin, n // 2), max(n - margin, n // 2))) for each, n in
                  zip((leftover.tiles.x[x], leftover.tiles.y[y]), leftover.picture.shape[1::-1]))
    distances = np.hypot(*(fit.measured.points.centers - place).T)[~fit.measured.points.on_isoline]
    is_reached = distances.min() < REACHED * max(leftover.picture.shape[:2])
    return [Finding('below zero', f'the background falls to {in_words([background.min()])}, below 0, near {place}',
                    'crop there, or check darks and flats' if is_reached else 'add a point of empty sky there',
                    places=(place,), numbers={'lowest': float(background.min())})]


def check_misfits(fit, misfits, picture):
    """Return the Findings for points that do not fit, or for points that hardly agree."""
    points, findings = fit.measured.points, []
    for i, error in misfits:
        hint, advice = ('brighter', 'is it on a star or nebula?') if error > 0 else (
            'darker', 'is it on a dust cloud or a border?')
        if points.on_isoline[i]:
            hint, advice = 'off', 'is its isoline right?'
        counts, verb = rounded(float(f'{picture.scale * abs(error):.3g}')), 'from' if hint == 'off' else 'than'
        findings.append(Finding(
            'misfit', f'{points.describe([i])} is {counts} {hint} {verb} what its neighbors suggest',
            advice + (' If so, remove it with --edit' if points.is_chosen else ''),
            places=((int(points.x[i]), int(points.y[i])),), numbers={'error': picture.scale * error}))
    if len(points.x) > 4 and not misfits and hardly_agree(fit):  # fewer points cannot be checked against each other
        findings.append(Finding(
            'scatter', 'the points hardly agree on a smooth background',
            'look at --preview, and move points off nebulae and stars; for a steep glow, add points'))
    return findings


def judge(fit, leftover, errors, findings):
    """Return the verdict, a Finding of kind 'fit': the quality of the fit and its expected error.

    The errors are those of `expected_errors`. Defects that were found are added: a corner by its height and width, an
    edge by its area, a step by the shares of the frame on both sides.
    """
    area, added = math.prod(leftover.picture.shape[:2]), 0.0
    for finding in findings:
        if finding.kind in ('corner', 'edge'):
            x0, y0, x1, y1 = finding.places[0]
            share = (x1 - x0) * (y1 - y0) / area
            added += finding.numbers['noises'] ** 2 * share / (3 if finding.kind == 'corner' else 5)
        elif finding.kind == 'step':
            part = finding.numbers['part']
            added += finding.numbers['noises'] ** 2 * part * (1 - part)
    noise, scale, kinds = float(leftover.noise.mean()), leftover.picture.scale, [finding.kind for finding in findings]
    expected, agree = math.sqrt((errors**2).mean() + added), float(np.sqrt((fit.adaptive.errors**2).mean()))
    n_levels = len(np.unique(fit.measured.points.leader))
    few = n_levels < LEAST_PLACES
    if n_levels <= 4:  # a plane through three has no errors, and a fourth is little more
        text = f'fit: not checked ({n_levels} points are too few; give at least five)'
        return Finding('fit', text, severity='remark', numbers={'word': 'fair', 'noises': None, 'expected': None,
                                                                'agree': None})
    word = 'poor' if expected >= POOR or 'step' in kinds or 'structure' in kinds else (
        'fair' if expected >= GOOD or few or {'corner', 'edge', 'part'} & set(kinds) else 'good')
    reason = ''
    if word != 'good':
        named = [words for kind, words in REASONS.items() if kind in kinds] + ['the points are few'] * (n_levels < 20)
        spread = agree > SCATTERED * np.sqrt((fit.measured.noise**2).mean())
        named.append('the points do not agree well' if spread else 'the background varies between the points')
        reason = f', because {named[0]}'
    unit = ' counts' if leftover.picture.dtype.kind in 'ui' else ''
    error = f'expected error {rounded(expected * noise * scale)}{unit}, {rounded(expected)} of the noise of a pixel'
    agreement = '' if few else f'; the points agree to {rounded(agree * scale)}'  # few always do
    text = f'fit: {word} ({error}{agreement}){reason}'
    is_alone = not any(finding.severity == 'warning' for finding in findings)
    advice = 'look at --preview' if word == 'poor' and is_alone else ''
    return Finding('fit', text, advice, 'warning' if advice else 'remark', numbers={
        'word': word, 'expected': expected * noise * scale, 'noises': expected, 'agree': agree * scale})


@np.errstate(all='ignore')  # huge values
def check_correction(correction, reference=None):
    """Return a Correction with its findings, the most important first, and its verdict.

    If there is a Reference, its light is first subtracted from the result.
    """
    fit, picture, settings = correction.fit, correction.picture, correction.settings
    if not fit.adaptive:
        fit = fit._replace(adaptive=classic_as_adaptive(fit.measured, fit.model.epsilon, settings.smooth))
    tiles, points = picture.tiles, fit.measured.points
    background = fit.model.at_grid(tiles.x, tiles.y)
    noise = tiles.noise + LEAST_NOISE * np.abs(np.median(fit.measured.levels, axis=0)) + TINY
    levels = correction.leveled(tiles.medians, background - correction.sky)
    if reference is not None:
        levels = levels - fit.reference.scale * reference.light_at(tiles)
    leftover = Leftover(levels / noise, background / noise, tiles, noise, picture)
    errors = expected_errors(fit, tiles.x[::COARSE], tiles.y[::COARSE], noise)
    known = np.isfinite(levels[::COARSE, ::COARSE]).all(axis=2)
    known |= not known.any()
    findings = check_misfits(fit, correction.misfits, picture)  # a bad point can cause all others
    findings += check_below_zero(fit, leftover, settings.sigma) + check_leftover(leftover, points)
    if not correction.misfits:  # misfits are a better reason
        findings += check_structure(fit, leftover)
    if fit.reference:
        is_itself = reference is not None and picture.path == reference.path != ''
        for finding in check_reference_fit(fit, picture, settings.sigma):
            if is_itself and finding.kind == 'same':  # as in: -i night/*.tif --reference night/best.tif
                finding = finding._replace(text='the reference is the picture itself, which stays as it is', advice='',
                                           severity='remark')
            findings.append(finding)
        findings += check_lost(points, fit.measured.reference.lost, picture)
    findings += check_parts(np.where(known, errors, np.nan), leftover) + check_span(points, picture)
    filled = check_filled(points)
    verdict = judge(fit, leftover, errors[known], findings + filled)
    if verdict.numbers['word'] != 'good':
        findings = filled + findings
    if picture.mask is not None and picture.masked_share == 0:
        findings.append(Finding('mask', 'the mask is 0 everywhere, and masks nothing', 'set masked areas to 255'))
    findings += [Finding('file', remark) for remark in getattr(picture, 'remarks', ())]
    return dataclasses.replace(correction, findings=tuple(findings), verdict=verdict)


def classic_as_adaptive(measured, epsilon, smooth):
    """Return an AdaptiveModel similar to the classic model. Its errors estimate those of the classic model."""
    centers, levels, leader = problem = measured.points.centers, measured.levels, measured.points.leader
    terms = trend_terms(centers, centers, 'mean')
    residuals = without_trend(levels, terms)
    trend = _Trend('mean', terms, residuals, np.abs(residuals).max(axis=0) > 1e-10 * np.abs(levels).max(axis=0))
    kernel = multiquadric(distances_between(centers, centers), epsilon)
    return _solve(problem, trend, smooth + 1e-9, _decompose(kernel, epsilon))


def check_limits(correction, picture, counts):
    """Return Findings about the values of a corrected picture.

    Counts are numbers of pixels: with a channel that became the smallest, with one that became the largest value, and
    with a background outside the range of the type, see `Correction.corrected_strip` and `background_strip`.
    """
    findings, percents = [], 100 * np.asarray(counts[:2]) / math.prod(picture.shape[:2])
    if picture.dtype.kind == 'f':
        if percents.sum() >= LEAST_LIMITED:
            findings.append(Finding(
                'range', f'{rounded(percents.sum())} % of the pixels are outside 0 ... 1, which some programs clip',
                advised_sky(correction, picture, is_dark=percents[0] >= percents[1]), 'remark',
                numbers={'percent': float(percents.sum())}))
        return findings
    for percent, color in zip(percents, ('black', 'white')):
        if percent >= LEAST_LIMITED:
            findings.append(Finding(color, f'{rounded(percent)} % of the pixels became {color}',
                                    advised_sky(correction, picture, color == 'black'),
                                    numbers={'percent': float(percent)}))
    if counts[2]:
        findings.append(Finding('background', f'the background of {counts[2]} pixels does not fit in the type of the '
                                'picture, and was limited', 'add a point of empty sky near them',
                                numbers={'pixels': int(counts[2])}))
    return findings


@np.errstate(all='ignore')
def advised_sky(correction, picture, is_dark):
    """Return advice with a sky level that avoids black or white pixels, if there is such a level."""
    method, (height, width, n_channels) = correction.settings.method, picture.shape
    stretch = '' if is_dark or method != 'subtract' else ', or keep white with --stretch'
    words = 'raise the sky' if is_dark else 'lower the sky'
    if method == 'divide' and is_dark:
        return f'{words} with --sky, or subtract'
    lowest, highest = (0.0, correction.white) if picture.dtype.kind == 'f' else range_of(picture.dtype, picture.blank)
    samples = []
    for y in np.unique(np.linspace(0, height - 1, 200).astype(int)).tolist():
        values, usable = picture.usable(slice(y, y + 1), slice(0, width))
        background = correction.model.evaluate(y, y + 1, width)
        step = max(1, width // 1000)
        samples.append(np.stack([values[usable][::step], background[usable][::step]]).astype(float))
    values, background = np.concatenate(samples, axis=1)
    outside = values.min(axis=1) <= lowest if is_dark else values.max(axis=1) >= highest
    # Levels are tried from near to far.
    sky = float(picture.physical(correction.sky).mean())
    limit = float(picture.physical(highest if is_dark else lowest))
    for part in np.linspace(0.02, 1, 50):
        level = two_digits(sky + part * (limit - sky), is_dark)
        stored = (level - picture.zero) / picture.scale
        if not lowest < stored < highest:
            break
        tried = dataclasses.replace(correction, sky=np.full(n_channels, stored))
        after = tried.leveled(values, background - stored)
        limited = after.min(axis=1) <= lowest if is_dark else after.max(axis=1) >= highest
        if (limited & ~outside).mean() < LEAST_LIMITED / 200:
            return f'{words}, for example --sky {level:g}{stretch}'
    return f'add a point of empty sky where it is dark{stretch}' if is_dark else f'{words} with --sky{stretch}'


def two_digits(value, is_up):
    """Return a value rounded up or down to two digits."""
    unit = 10.0 ** (math.floor(math.log10(abs(value) or 1)) - 1)
    return float(f'{(math.ceil if is_up else math.floor)(value / unit) * unit:.6g}')


# ---- Chain ---------------------------------------------------------------------------------------

ABOVE_WHITE = 1.1  # times white: floats may be a little brighter, for example after resampling


def measure_points(picture: Picture, points: Points | None, settings: Settings) -> Measured:
    """Measure points. If `settings.auto` is a number, choose more points around the given ones."""
    if settings.auto is None:
        return measure_levels(picture, points, settings.sigma, settings.is_adaptive)
    measured = choose_points(picture, settings.auto or AUTO, settings.sigma, points)
    if settings.is_adaptive:
        return measured
    return measure_levels(picture, measured.points, settings.sigma, False)._replace(chosen=measured.chosen)


def correct_with_reference(picture: Picture, points: Points | None, settings: Settings, other: Picture) -> Correction:
    """Return the correction of a picture with a reference, registered in the first way that fits."""
    given = None
    if settings.auto is not None:
        points, given = places_with_reference(picture, settings.auto or REFERENCE_AUTO, settings.sigma, points)
    best, reasons = None, []
    for way in references(picture, other):
        try:
            with about(other.path):
                reference = way()
        except RmgradientError as error:  # it is not found this way, or a package is missing
            reasons.append(error)
            continue
        try:
            measured = measure_with_reference((picture, reference), points, settings.sigma, given)
            with about(other.path):
                fit = _fit_measured_reference(measured)
        except (NotRegistered, NamedError) as error:
            if not isinstance(error, NotRegistered) and not isinstance(error.__cause__, NotRegistered):
                raise
            reasons.append(error)
            continue
        n_explained = np.count_nonzero(fit.reference.explained)
        if not best or n_explained > best[0]:
            best = n_explained, fit, reference
        if n_explained == picture.shape[2] or reference.is_sure:  # its stars prove the registration
            break
    if not best:
        with about(other.path):
            raise reasons[0 if other.shape[:2] == picture.shape[:2] else -1]
    return correction_of(picture, best[1], settings, best[2])


def correction_of(picture: Picture, measured: Measured | Fit, settings: Settings,
                  reference: Reference | None = None) -> Correction:
    """Return the Correction of a picture from measured levels, for command, window and Python."""
    fit = measured if reference else fit_background(measured, settings.smooth)
    correction = Correction(fit, find_sky(fit, picture, settings), picture, settings, find_misfits(fit))
    if settings.method == 'stretch':
        if picture.dtype.kind == 'f':
            check_brightest(picture, correction.white, settings.rows)
        if (correction.sky >= correction.white).any():
            raise RmgradientError('to stretch, the sky has to be darker than white, '
                                  f'{in_words(picture.physical([correction.white]))}')
    return check_correction(correction, reference)


def check_brightest(picture, white, rows):
    """Raise RmgradientError if floats are far above white."""
    def brightest(start, stop):
        color, usable = picture.usable(slice(start, stop), slice(0, picture.shape[1]))
        return color[usable].max(initial=-np.inf)

    highest = float(max(picture.each_strip(brightest, rows)))
    if highest > ABOVE_WHITE * white:
        highest, white = picture.physical([highest, white])
        suggested = 65535 if 255 < highest <= 65535 else highest
        raise RmgradientError(f'there are values up to {in_words([highest])}, but white is {white:g}; set white, for '
                              f'example to {in_words([suggested])}')


def find_correction(image: ArrayLike | Picture, points: ArrayLike | Points | str, *,
                    reference: ArrayLike | Picture | None = None, mask: ArrayLike | None = None,
                    **settings: Any) -> Correction:
    """Find the background gradient of a picture, as the command does.

    Parameters
    ----------
    image : (height, width) or (height, width, n_channels) array_like, or a Picture
        Integers or floats. All channels count as colors: leave alpha out.
    points : Points, (n_points, 2) array_like, or 'auto'
        See `make_points`. With 'auto', `choose_points` chooses them.
    reference : (height, width) or (height, width, n_channels) array_like, or a Picture, optional
        Picture of the same field with less gradient, see `fit_with_reference`. If it is not registered, the stars of
        both, or coordinates in the sky (FITS files), show where it is. Needs the adaptive model.
    mask : (height, width) array_like of bool, optional
        True where nothing is measured, for example on land or nebulae. The mask of a numpy.ma array or a CCDData is
        added.
    **settings
        Fields of `Settings`. The level of the sky is

        - sky='gray': the median level of the points, averaged over the channels, for all channels;
        - sky='color': the median level of each channel, so that the sky keeps its average color;
        - sky='darkest': the lowest background of each channel in the frame;
        - a number, or one for each channel;
        - by default 'gray'; 'color' with method='divide'; 'darkest' with a number for smooth; with a reference of the
          same type, the level of the reference, unless it differs by more than a factor of four.

        With auto, automatic points are added to the given ones.

    Returns
    -------
    Correction
        Its `apply` returns the picture without its background. It has the points, levels, model and sky level.

    Raises
    ------
    RmgradientError
        If image, points and settings do not fit together. The message says why.

    Warns
    -----
    RmgradientWarning
        For each finding that is a warning.
    """
    if isinstance(points, str):
        if points != 'auto':
            raise RmgradientError(f"points are {points!r}, neither coordinates nor 'auto'")
        settings = {'auto': 0, **settings}
    chain = Settings(**settings)
    picture = as_picture(image, mask)
    check_sky(chain.sky, picture)
    given = None if isinstance(points, str) else as_points(points)
    if reference is None:
        correction = correction_of(picture, measure_points(picture, given, chain), chain)
    else:
        if not chain.is_adaptive:
            raise RmgradientError("a reference needs smooth='auto'")
        other = as_picture(reference)
        check_reference(picture.shape, other.shape)
        correction = correct_with_reference(picture, given, chain, other)
    warn([correction.verdict, *correction.findings])
    return correction


def warn(findings):
    """Issue Findings as Python warnings, unless they are remarks."""
    for finding in findings:
        if finding.severity == 'warning':
            warnings.warn(str(finding), RmgradientWarning, stacklevel=3)


def remove_gradient(image: ArrayLike | Picture, points: ArrayLike | Points | str, *,
                    reference: ArrayLike | Picture | None = None, mask: ArrayLike | None = None,
                    **settings: Any) -> np.ndarray:
    """Remove the background gradient from an array, as the command does from a file.

    Parameters, errors and warnings are those of `find_correction`. Returns a new array of the shape and dtype of the
    image, in native byte order. Masked pixels are corrected, too. A numpy.ma array keeps its mask. Memory: the result,
    and a few groups of rows in float64.
    """
    return find_correction(image, points, reference=reference, mask=mask, **settings).apply(image)


# ---- Picture files -------------------------------------------------------------------------------

class RandomAccess:
    """The bytes of an open file. May be read from several threads."""

    def __init__(self, file):
        self._file, self._lock = file, threading.Lock()
        self.size = os.fstat(file.fileno()).st_size

    def read(self, offset, size):
        """Return bytes. Raise Damage if the file ends before."""
        if offset < 0 or offset + size > self.size:
            raise Damage(f'it ends at byte {self.size}, {offset + size - self.size} bytes too early')
        parts = []
        while size:
            part = self._read_part(offset, min(size, 2**30))  # systems read at most 2 GiB in one call
            if not part:
                raise Damage(f'it ends at byte {offset}, {size} bytes too early')
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b''.join(parts)

    def _read_part(self, offset, size):
        if hasattr(os, 'pread'):
            return os.pread(self._file.fileno(), size, offset)
        with self._lock:  # Windows
            self._file.seek(offset)
            return self._file.read(size)


class FilePicture(Picture):
    """An open picture file. Each format has a subclass."""

    format: str  # its name, for messages
    beginning: bytes  # regular expression for the first bytes of its files
    endings: tuple[str, ...]  # of file names, the usual one first
    can_compress = False
    remarks: list[str]  # about parts of the file that are left out

    def __init__(self, path, file=None):
        self.path, self.remarks = os.fspath(path), []
        self._file = file or open(path, 'rb')  # noqa: SIM115
        try:
            with self._damage():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self):
        raise NotImplementedError

    def close(self):
        self._file.close()

    def write(self, file, strip_at, kind, settings):
        """Write a picture like this one into a seekable file, strip by strip.

        Parameters
        ----------
        file : binary file
        strip_at : callable
            Returns rows start to stop - 1, (n_rows, width, n_samples) for the output, (n_rows, width, n_channels)
            for the background. It is called in threads.
        kind : 'output' or 'background'
        settings : Settings
            Rows of a strip, and compression.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def _damage(self):
        """Turn errors of libraries on damaged files into RmgradientError. Libraries raise a dozen types of them."""
        try:
            yield
        except Damage as error:
            raise RmgradientError(f'damaged: {error}') from error
        except (RmgradientError, OSError, MemoryError):
            raise
        except Exception as error:
            what = f'{self.format} libraries cannot read it'
            if type(error).__module__.startswith('imagecodecs'):
                what = 'its strips or tiles cannot be decoded'
            raise RmgradientError(f'damaged: {what}') from error


# ---- TIFF directories ----------------------------------------------------------------------------

SHORT, LONG, LONG8, IFD8 = 3, 4, 16, 18
TYPE_SIZES = {code: struct.calcsize(f'={kind}') for code, kind in tifffile.TIFF.DATA_FORMATS.items()}
NUMBERS = {code: tifffile.TIFF.DATA_FORMATS[code][-1] for code in (1, 3, 4, 13, 16, 18)}  # unsigned


class Tag(NamedTuple):
    """Entry of a TIFF directory. Its value is the bytes in the file, or the tags of a sub-directory."""

    code: int
    type: int
    count: int
    value: bytes | list


def directory_structs(byteorder, bigtiff):
    """Return the structs of the parts of a directory: number of entries, entry, pointer."""
    codes = ('Q', 'HHQ8s', 'Q') if bigtiff else ('H', 'HHI4s', 'I')
    return [struct.Struct(byteorder + code) for code in codes]


class TiffBytes(RandomAccess):
    """The bytes of an open TIFF file and its directories. May be used from several threads.

    `byteorder` is '<' or '>', `first` is the offset of the first directory. In a damaged file, directories and values
    can point anywhere, also to the same bytes. To limit the work, the sizes of all directories and values must not be
    larger than the file, and no directory is read twice.
    """

    def __init__(self, file):
        super().__init__(file)
        self._left, self._directories = self.size, set()
        self.byteorder = '<' if self.read(0, 2) == b'II' else '>'
        self.bigtiff = self.numbers(SHORT, 1, 2) == (43,)
        self.first, = self.numbers(LONG8, 1, 8) if self.bigtiff else self.numbers(LONG, 1, 4)

    def numbers(self, type_, count, offset):
        """Return a tuple of unsigned integers of a type."""
        data = self.read(offset, count * TYPE_SIZES[type_])
        return struct.unpack(f'{self.byteorder}{count}{NUMBERS[type_]}', data)

    def declared(self, offset, size):
        """Return the bytes of a directory or of a value in it. Raise Damage if all of them are larger than the file."""
        self._left -= size
        if self._left < 0:
            raise Damage('its directories and values are larger than the file')
        return self.read(offset, size)

    def directory(self, offset):
        """Return (code, type, count, offset of the value) of each entry, and the offset of the next directory."""
        head, entry, pointer = directory_structs(self.byteorder, self.bigtiff)
        if offset in self._directories:
            raise Damage(f'the directory at byte {offset} is referred to twice')
        self._directories.add(offset)
        n_entries, = head.unpack(self.read(offset, head.size))
        if n_entries > 4096:  # the limit of tifffile: no program writes so many
            raise Damage(f'a directory of {n_entries} tags')
        offset += head.size
        data = self.declared(offset, n_entries * entry.size + pointer.size)
        entries = []
        for i in range(n_entries):
            code, type_, count, value = entry.unpack_from(data, i * entry.size)
            inline = count * TYPE_SIZES.get(type_, 1) <= len(value)
            here = offset + (i + 1) * entry.size - len(value)
            entries.append((code, type_, count, here if inline else pointer.unpack(value)[0]))
        return entries, pointer.unpack_from(data, n_entries * entry.size)[0]


def pack_head(byteorder, bigtiff, offset=None):
    """Return the first bytes of a file, with the offset of the first directory. By default, it follows these bytes."""
    magic = b'II' if byteorder == '<' else b'MM'
    if bigtiff:
        return magic + struct.pack(byteorder + 'HHHQ', 43, 8, 0, offset or 16)
    return magic + struct.pack(byteorder + 'HI', 42, offset or 8)


def pack_directory(tags, offset, byteorder, bigtiff):
    """Return the bytes of a directory at an even offset, followed by its values and sub-directories."""
    head, entry, pointer = directory_structs(byteorder, bigtiff)
    entries, values, end = [], [], offset + head.size + len(tags) * entry.size + pointer.size
    for code, type_, count, value in sorted(tags, key=lambda tag: tag.code):
        if isinstance(value, list):
            value, type_ = pack_directory(value, end, byteorder, bigtiff), IFD8 if bigtiff else LONG
        elif len(value) <= pointer.size:
            entries.append(entry.pack(code, type_, count, value))
            continue
        entries.append(entry.pack(code, type_, count, pointer.pack(end)))
        values.append(value + bytes(len(value) % 2))
        end += len(values[-1])
    return b''.join([head.pack(len(tags)), *entries, pointer.pack(0), *values])


# ---- TIFF ----------------------------------------------------------------------------------

EXIF, GPS, INTEROPERABILITY, ICC, XMP, DESCRIPTION = 34665, 34853, 40965, 34675, 700, 270
METAMORPH, IMAGEJ = range(33628, 33632), (50838, 50839)  # they describe all planes of a stack
GDAL_NODATA = 42113  # a number as text
SUB_DIRECTORIES = {None: {EXIF, GPS, INTEROPERABILITY}, EXIF: {INTEROPERABILITY}}  # by the directory that has them
# Tags that describe how pixels are stored: the output has its own. 254, 255, 297: kind and number of the page.
STRUCTURE_TAGS = {*range(254, 260), 262, 266, 273, 277, 278, 279, 284, 288, 289, 292, 293, 297, 317,
                  *range(322, 326), 330, 338, 339, 347, 400, *range(512, 522)}
# Tags that describe the old pixels: smallest and largest value, layers of Photoshop.
STALE_TAGS = {280, 281, 37724}
NAMES_OF_TAGS = {ICC: 'the ICC profile', XMP: 'the XMP packet', EXIF: 'EXIF', GPS: 'GPS'}
# Structure tags that are needed to find the pixels, and the depth of volumes.
LAYOUT_TAGS = STRUCTURE_TAGS - {330, 400} | {32997, 32998}
PER_SAMPLE_TAGS = {340, 341}  # smallest and largest possible value of each sample
# Compressions of separate segments, and the largest factor by which each can expand.
COMPRESSIONS = {1: 1, 5: 1400, 8: 1040, 32946: 1040, 32773: 64, 34925: 10000, 50000: 44000}
NAMES_OF_COLORS = {3: 'a palette', 4: 'a transparency mask', 5: 'CMYK', 6: 'YCbCr', 8: 'CIE Lab',
                   9: 'ICC Lab', 10: 'ITU Lab', 32803: 'a raw color filter array', 34892: 'linear raw',
                   32844: 'CIE Log L', 32845: 'CIE Log Luv'}


class TiffImage(FilePicture):
    """An open TIFF picture. If zero is white, gray values are inverted when they are read.

    Memory: for an uncompressed file, only the requested rows. For a compressed file, the decoded segments (strips or
    tiles) with these rows, and the segments for requests of other threads.
    """

    format, endings, can_compress = 'TIFF', ('.tif', '.tiff'), True
    beginning = rb'II[*+]\0|MM\0[*+]'

    def _open(self):
        self._bytes = file = TiffBytes(self._file)
        entries, next_directory = file.directory(file.first)
        self._page = page = self._read_layout(entries)
        check_page(page)
        check_segments(page, file.size)
        self.n_samples, self.dtype = page.samplesperpixel, page.dtype.newbyteorder('=')
        self.shape = page.imagelength, page.imagewidth, count_colors(page)
        self._photometric, self._extra_samples = int(page.photometric), [int(kind) for kind in page.extrasamples]
        self.alpha = self._extra_samples.index(2) - len(self._extra_samples) if 2 in self._extra_samples else None
        self._unreadable = []
        tags, n_pages = self._read_tags(entries), 1 + self._count_pictures(next_directory)
        self.remarks += [f'{what} cannot be read and is left out' for what in self._unreadable[:3]]
        if n_more := len(self._unreadable[3:]):
            self.remarks.append(f'{n_more} more tags cannot be read and are left out')
        most_planes = file.size // page.nbytes
        self._tags, n_pages = first_of_stack(tags, n_pages, math.prod(page.shape), most_planes)
        if n_pages > 1:
            verb = 'is' if n_pages == 2 else 'are'
            self.remarks.append(f'only the first of {n_pages} pages is corrected, '
                                 f'{n_pages - 1} {verb} left out')
        self._grid = grid_of_segments(page)
        # Segments with reversed bits or a predictor are decoded whole, like compressed ones.
        self._is_plain = page.compression == 1 and page.fillorder == 1
        page.decode  # made now: making it is not safe in threads  # noqa: B018
        self._decoded, self._lock = collections.OrderedDict(), threading.Lock()
        self.blank = self._find_blank()
        if 1 in self._extra_samples:
            self._check_opaque(page.extrasamples.index(1) - len(page.extrasamples))

    def _find_blank(self):
        """Return the value of GDAL_NODATA, or None if there is none or it does not fit in the type."""
        text = next((tag.value for tag in self._tags if tag.code == GDAL_NODATA and tag.type == 2), b'')
        with contextlib.suppress(ValueError, OverflowError):
            words = text.rstrip(b'\0 ')
            value = int(words) if re.fullmatch(rb'[+-]?[0-9]+', words) else float(words)
            with np.errstate(over='ignore'):
                stored = self.dtype.type(value)
            if math.isfinite(stored) and (self.dtype.kind == 'f' or stored == value):
                if self._photometric == 0:
                    stored = invert(np.array([[stored]]))[0, 0]
                return stored.item()
        return None

    def _check_opaque(self, sample):
        """Raise RmgradientError unless associated alpha is opaque everywhere."""
        opaque = range_of(self.dtype)[1] if self.dtype.kind in 'ui' else 1.0
        if not all((self.read(start, stop)[..., sample] == opaque).all() for start, stop in row_groups(self.shape[0])):
            raise RmgradientError('colors are multiplied by alpha; save without transparency, or with '
                                  'unassociated alpha')

    def _read_layout(self, entries):
        """Return a tifffile.TiffPage made only from the tags of the layout."""
        file, tags = self._bytes, {}
        for code, type_, count, offset in entries:
            if code in LAYOUT_TAGS and type_ in TYPE_SIZES:
                if code in tags:
                    raise Damage(f'tag {code} is there twice')
                tags[code] = Tag(code, type_, count, file.declared(offset, count * TYPE_SIZES[type_]))
        check_layout({code: struct.unpack(f'{file.byteorder}{tag.count}{NUMBERS[tag.type]}', tag.value)
                      for code, tag in tags.items() if tag.type in NUMBERS and tag.count < 2**16})
        head = pack_head(file.byteorder, file.bigtiff)
        directory = pack_directory(tags.values(), len(head), file.byteorder, file.bigtiff)
        return tifffile.TiffFile(io.BytesIO(head + directory)).pages.first

    def read(self, start, stop, left=0, right=None):
        right = right or self.shape[1]
        segment_height, segment_width, planes, down, across = self._grid
        window = np.empty((stop - start, right - left, self.n_samples), self.dtype)
        rows = range(start // segment_height, -(-stop // segment_height))
        columns = range(left // segment_width, -(-right // segment_width))
        indices = list(itertools.product(range(planes), rows, columns))
        for plane, i, j in indices:
            x, y = j * segment_width, i * segment_height
            first, last = max(start, y), min(stop, y + segment_height)
            first_x, last_x = max(left, x), min(right, x + segment_width)
            with self._damage():
                index = (plane * down + i) * across + j
                segment = self._part_of(index, slice(first - y, last - y), slice(first_x - x, last_x - x), len(indices))
                if segment.shape[:2] != (last - first, last_x - first_x):
                    raise Damage(f'segment {index} is cut short')
            samples = slice(plane, plane + 1) if planes > 1 else slice(None)
            window[first - start:last - start, first_x - left:last_x - left, samples] = segment
        with np.errstate(invalid='ignore'):  # signaling NaN
            return invert(window) if self._photometric == 0 else window

    def _part_of(self, index, rows, columns, n_segments):
        """Return rows and columns of a strip or tile, counted from its corner. The caller needs `n_segments` in all."""
        if not self._is_plain:
            return self._decode_once(index, n_segments)[rows, columns]
        dtype = self.dtype.newbyteorder(self._bytes.byteorder)
        _, width, planes, _, _ = self._grid
        samples, offset = self.n_samples // planes, self._page.dataoffsets[index]
        pixel = samples * dtype.itemsize
        n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
        if 16 * n_columns < width:  # a window around a point: 0.09 instead of 0.3 ms if rows have 6000 pixels
            data = b''.join(self._bytes.read(offset + (y * width + columns.start) * pixel, n_columns * pixel)
                            for y in range(rows.start, rows.stop))
            return np.frombuffer(data, dtype).reshape(n_rows, n_columns, samples)
        data = self._bytes.read(offset + rows.start * width * pixel, n_rows * width * pixel)
        return np.frombuffer(data, dtype).reshape(n_rows, width, samples)[:, columns]

    def _decode_once(self, index, n_segments):
        """Return a decoded segment. The last ones are kept, since groups of rows and segments overlap."""
        with self._lock:
            future = self._decoded.pop(index, None)
            if is_new := future is None:
                future = concurrent.futures.Future()
            self._decoded[index] = future
            while len(self._decoded) > n_segments * (N_WORKERS + 1):
                self._decoded.popitem(last=False)
        if is_new:
            try:
                data = self._bytes.read(self._page.dataoffsets[index], self._page.databytecounts[index])
                future.set_result(self._page.decode(data, index)[0][0])
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def write(self, file, strip_at, kind, settings):
        """Write strips as a TIFF like this one into a seekable file, see `FilePicture.write`."""
        n_samples = self.n_samples if kind == 'output' else self.shape[2]
        size = self.shape[0] * self.shape[1] * n_samples * self.dtype.itemsize
        size += sum(len(tag.value) for tag in self._tags)
        # Deflate makes noise slightly longer. 64 MB are enough for this and for the tags.
        bigtiff = self._bytes.bigtiff or size > 2**32 - 2**26
        predictor = predictor_for(self.dtype) if settings.compress else 1
        stored = self.dtype.newbyteorder(self._bytes.byteorder)

        def encoding(start, stop):
            strip = strip_at(start, stop)
            strip = invert(strip) if self._photometric == 0 else strip
            return encode_strip(strip, stored, predictor, settings.compress)

        offsets, sizes = [], []
        file.write(pack_head(self._bytes.byteorder, bigtiff))  # the final one, with the offset, is written last
        for data in self.each_strip(encoding, settings.rows):
            offsets.append(file.tell())
            sizes.append(file.write(data))
            if sizes[-1] % 2:
                file.write(b'\0')  # values start at even offsets
        end, place = file.tell(), LONG8 if bigtiff else LONG
        structure = self._structure(n_samples) | {
            'Compression': (SHORT, [8 if settings.compress else 1]), 'StripOffsets': (place, offsets),
            'RowsPerStrip': (LONG, [min(settings.rows, self.shape[0])]), 'StripByteCounts': (place, sizes)}
        if predictor != 1:
            structure['Predictor'] = SHORT, [predictor]
        tags = [self._pack_tag(name, *values) for name, values in structure.items()]
        tags += [first_samples(tag, n_samples) for tag in self._tags
                 if not (is_shape(tag) and (self._page.planarconfig == 2 or n_samples != self.n_samples))]
        file.write(pack_directory(tags, end, self._bytes.byteorder, bigtiff))
        file.seek(0)
        file.write(pack_head(self._bytes.byteorder, bigtiff, end))

    def _structure(self, n_samples):
        """Return {name: (type, values)} of the tags that describe the pixels."""
        height, width, _ = self.shape
        structure = {'ImageWidth': (LONG, [width]), 'ImageLength': (LONG, [height]),
                     'BitsPerSample': (SHORT, [self.dtype.itemsize * 8] * n_samples),
                     'PhotometricInterpretation': (SHORT, [self._photometric]),
                     'SamplesPerPixel': (SHORT, [n_samples]), 'PlanarConfiguration': (SHORT, [1]),
                     'SampleFormat': (SHORT, ['uif'.index(self.dtype.kind) + 1] * n_samples)}
        n_colors = 3 if self._photometric == 2 else 1  # other bands are written as extra samples
        if n_samples > n_colors and self._extra_samples:
            structure['ExtraSamples'] = SHORT, self._extra_samples[:n_samples - n_colors]
        return structure

    def _pack_tag(self, name, type_, values):
        """Return a Tag of unsigned integers."""
        data = struct.pack(f'{self._bytes.byteorder}{len(values)}{NUMBERS[type_]}', *values)
        return Tag(tifffile.TIFF.TAGS[name], type_, len(values), data)

    def _read_tags(self, entries, inside=None):
        """Return the tags to keep of the first directory or of a sub-directory, byte for byte."""
        tags = []
        for code, type_, count, offset in entries:
            if inside is None and code in STRUCTURE_TAGS | STALE_TAGS:
                continue
            try:
                if code in SUB_DIRECTORIES.get(inside, ()):
                    within, _ = self._bytes.directory(self._bytes.numbers(type_, 1, offset)[0])
                    tags.append(Tag(code, LONG, 1, self._read_tags(within, code)))
                elif type_ in (13, 18) or code in SUB_DIRECTORIES[None]:
                    raise Damage('it points to a directory of unknown use')
                else:
                    value = self._bytes.declared(offset, count * TYPE_SIZES[type_])
                    tags.append(Tag(code, type_, count, value))
            except (KeyError, Damage) as error:
                what = NAMES_OF_TAGS.get(code, f'tag {code}')
                if code in (ICC, XMP):
                    reason = error if isinstance(error, Damage) else 'its type is unknown'
                    raise RmgradientError(f'{what} cannot be read: {reason}') from error
                self._unreadable.append(what)
        return tags

    def _count_pictures(self, directory):
        """Return how many other pages are pictures, not thumbnails or levels of a pyramid."""
        height, width, _ = self.shape
        n_pictures, seen = 0, {0, self._bytes.first}
        while directory not in seen and len(seen) < 10000:
            seen.add(directory)
            try:
                entries, directory = self._bytes.directory(directory)
                tags = {code: self._bytes.numbers(type_, 1, offset)[0] for code, type_, _, offset in entries
                        if code in (254, 255, 256, 257)}
            except (KeyError, Damage, OSError):
                self.remarks.append('another page is damaged and left out')
                break
            is_level = any(abs(tags.get(256, 0) - width / 2**k) < 1 > abs(tags.get(257, 0) - height / 2**k)
                           for k in range(1, 16))
            n_pictures += not (tags.get(254, 0) & 1 or tags.get(255) == 2 or is_level)
        return n_pictures


def first_of_stack(tags, n_pages, n_values, most):
    """Return the tags that are valid for the first plane alone, and the number of planes or pages.

    A plane has n_values. Tags that describe more planes than `most` are wrong. ImageJ and MetaMorph write a stack as
    one page. tifffile and OME describe all pages in the first.
    """
    text = next((tag.value for tag in tags if tag.code == DESCRIPTION and tag.type == 2), b'')
    n_planes = next((tag.count for tag in tags if tag.code == METAMORPH[1]), 1)
    if text.startswith(b'ImageJ='):
        n_planes = max(map(int, re.findall(rb'^images=(\d{1,9})[\r\0]*$', text, re.MULTILINE)), default=1)
        text = re.sub(rb'^(images|channels|slices|frames|hyperstack)=[^\n\0]*\n?', b'', text,
                      flags=re.MULTILINE)
    elif shape := re.match(rb'{(?:"truncated": true, )?"shape": \[([\d, ]{1,200})\]', text):
        n_planes, text = math.prod(map(int, re.findall(rb'\d+', shape[1]))) // n_values, b''
    elif b'<OME' in text:
        text = b''
    if n_planes > max(most, n_pages) or max(n_planes, n_pages) == 1:
        return tags, n_pages
    stale = {*METAMORPH, *IMAGEJ, *(() if text else [DESCRIPTION])}
    return [tag._replace(count=len(text), value=text) if tag.code == DESCRIPTION else tag for tag in tags
            if tag.code not in stale], max(n_pages, n_planes)


def invert(rows):
    """Invert the gray of a picture whose zero is white, or back. Alpha is not changed."""
    gray = rows[..., :1]
    return np.concatenate([1 - gray if rows.dtype.kind == 'f' else ~gray, rows[..., 1:]], axis=-1)


def predictor_for(dtype):
    """Return the predictor for compression: differences of integers, or bytes of floats.

    There is none for 64 bit integers, since programs disagree about their differences.
    """
    return 3 if dtype.kind == 'f' else 2 if dtype.itemsize < 8 else 1


def encode_strip(strip, stored, predictor, level):
    """Return the bytes of a (n_rows, width, n_samples) strip in the dtype of a file. Level 0 is no compression.

    tifffile could write strips, but it does not keep rational numbers, resolutions and sub-directories byte for byte.
    So the whole file is written here.
    """
    if predictor == 2:
        strip = imagecodecs.delta_encode(np.ascontiguousarray(strip), axis=-2)
    data = np.ascontiguousarray(strip, stored)
    if predictor == 3:
        data = imagecodecs.floatpred_encode(data, axis=-2)
    return imagecodecs.deflate_encode(data.tobytes(), level) if level else data


def is_shape(tag):
    """Whether a Tag is tifffile's description of the shape. It is wrong if samples are stored in another way."""
    return tag.code == DESCRIPTION and tag.type == 2 and tag.value.startswith(b'{"shape"')


def first_samples(tag, n_samples):
    """Cut a Tag with one value for each sample to the first samples. Return other tags as they are."""
    if tag.code not in PER_SAMPLE_TAGS or tag.count <= n_samples:
        return tag
    return tag._replace(count=n_samples, value=tag.value[:n_samples * TYPE_SIZES[tag.type]])


def check_layout(structure):
    """Refuse {code: values} of structure that tifffile would guess or correct, or where it fails."""
    for code, name in ((256, 'width'), (257, 'height'), (262, 'kind of colors')):
        if code not in structure:
            raise Damage(f'no {name} given')
    if structure.get(254, (0,))[0] & 1 or structure.get(255) == (2,):
        raise RmgradientError('the first page is a thumbnail, as in camera raw pictures; develop it, or save '
                              'the picture alone')
    if any(len(set(structure.get(code, ()))) > 1 for code in (258, 339)):
        raise RmgradientError('channels have different types')
    if any(0 in structure.get(code, ()) for code in (278, 322, 323)):
        raise Damage('strips or tiles without pixels')


def check_page(page):
    """Refuse a tifffile.TiffPage with unsupported pixels."""
    colors, dtype, bits = 3 if page.photometric == 2 else 1, page.dtype, page.bitspersample
    if page.photometric not in (0, 1, 2):
        kind = NAMES_OF_COLORS.get(int(page.photometric), f'of unknown kind {int(page.photometric)}')
        raise RmgradientError(f'colors are {kind}; convert the picture to gray or RGB')
    if page.imagewidth < 1 or page.imagelength < 1:
        raise Damage(f'{page.imagewidth} x {page.imagelength} pixels')
    if page.imagedepth != 1 or page.is_tiled and page.tiledepth != 1:
        raise RmgradientError('a volume; save a flat picture')
    if page.sampleformat not in (1, 2, 3):
        raise RmgradientError('pixels are complex numbers' if page.sampleformat in (5, 6) else
                              f'pixels are of unknown format {int(page.sampleformat)}')
    if dtype is None or dtype.kind not in 'uif' or dtype.itemsize * 8 != bits:
        kind = 'floating point numbers' if page.sampleformat == 3 else 'integers'
        raise RmgradientError(f'pixels are {kind} of {bits} bit; convert the picture to 8, 16 or 32 bit')
    if page.samplesperpixel < colors:
        raise Damage(f'{page.samplesperpixel} channels instead of {colors}')
    if len(page.extrasamples) not in (0, page.samplesperpixel - colors):
        raise Damage(f'{len(page.extrasamples)} extra samples and {colors} of {page.samplesperpixel} '
                     'channels')
    if page.planarconfig not in (1, 2):
        raise Damage(f'planar configuration {page.planarconfig}')
    if page.compression not in COMPRESSIONS:
        name = getattr(page.compression, 'name', f'of unknown kind {int(page.compression)}')
        raise RmgradientError(f'compression is {name}; save with LZW, deflate or without compression')
    if page.predictor not in (1, 2, 3) or page.predictor == 3 and dtype.kind != 'f':
        raise Damage(f'predictor {int(page.predictor)} for {dtype}')
    if page.predictor != 1 and page.compression in (1, 32773):
        raise RmgradientError('a predictor without a compression that has one, which programs read differently; save '
                              'it again, without a predictor')


def count_colors(page):
    """Return how many samples of a tifffile.TiffPage are colors.

    Programs for maps write bands as gray with unspecified extra samples. Three or more of these all count as colors.
    """
    n_colors = 3 if page.photometric == 2 else 1
    if page.photometric != 1 or page.samplesperpixel < 3:
        return n_colors
    kinds = [int(kind) for kind in page.extrasamples] or [0] * (page.samplesperpixel - 1)
    n_bands = 1 + len(list(itertools.takewhile(lambda kind: kind == 0, kinds)))
    return n_bands if n_bands >= 3 else n_colors


def grid_of_segments(page):
    """Return height and width of the segments of a tifffile.TiffPage, and how many planes, down, across."""
    height, width = page.rowsperstrip, page.imagewidth
    if page.is_tiled:
        height, width = page.tilelength, page.tilewidth
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    return height, width, planes, -(-page.imagelength // height), -(-page.imagewidth // width)


def check_segments(page, file_size):
    """Refuse a tifffile.TiffPage with missing segments, which tifffile would read as zeros."""
    height, width, planes, down, across = grid_of_segments(page)
    offsets, sizes = page.dataoffsets, page.databytecounts
    if not len(offsets) == len(sizes) == across * down * planes:
        raise Damage(f'{len(offsets)} offsets and {len(sizes)} sizes for {across * down * planes} segments')
    row = width * page.samplesperpixel // planes * page.dtype.itemsize
    ratio = COMPRESSIONS[int(page.compression)]
    if page.is_tiled and (height > 2 * max(page.imagelength, 512) or width > 2 * max(page.imagewidth, 512)):
        raise Damage(f'tiles of {width} x {height} pixels')
    for i, (offset, size) in enumerate(zip(offsets, sizes)):
        n_rows = height if page.is_tiled else min(height, page.imagelength - i % down * height)
        segment = f'segment {i} of {len(sizes)}'
        if size == 0 or offset == 0:
            raise Damage(f'{segment} is missing')
        if offset + size > file_size:
            raise Damage(f'{segment} ends at byte {offset + size} of a file of {file_size}')
        if n_rows * row > size * ratio:
            raise Damage(f'{segment} has {size} bytes, too few for {n_rows} rows of {row} bytes')
    if sum(sizes) > file_size:
        raise Damage(f'segments of {sum(sizes)} bytes overlap in a file of {file_size}')


# ---- FITS ----------------------------------------------------------------------------------------

FITS_BLOCK, FITS_CARD = 2880, 80  # bytes
MOST_CARDS, MOST_HEADERS = 36000, 100  # in a header, and headers before the picture: more is damage
MOSAIC_CARDS = 'BAYERPAT', 'COLORTYP', 'CFAPAT', 'CFATYPE', 'BAYER', 'XBAYROFF'  # programs name raw colors so
MOST_PACKED = 3000  # largest compression ratio: more than any compression of the standard has
MOST_GZIPPED, LEAST_GZIPPED = 50, 2**30  # largest compression ratio, for pictures of more than so many bytes
STALE_CARDS = {b'DATAMIN ', b'DATAMAX ', b'CHECKSUM', b'DATASUM '}  # they describe the old pixels


class FitsHeader(NamedTuple):
    """A header of a FITS file, and the place of its data."""

    cards: list  # of 80 bytes, without END
    valued: dict  # {keyword of 8 bytes: its first card with a value}
    start: int
    data: int  # offset of the data
    axes: list = []  # lengths, the fastest first
    end: int = 0  # offset of the end of the data, without padding

    def get(self, name, default=None):
        """Return the value of a keyword: None if it is undefined, a default if there is no such card."""
        card = self.valued.get(f'{name:8}'.encode())
        return default if card is None else parse_card(card)

    def whole_number(self, name, default=None):
        """Return the value of a keyword if it is a whole number. Raise Damage if not."""
        value = self.get(name, default)
        if type(value) is not int:  # also refuses bool
            raise Damage(f'{name} is {value!r}, not a whole number')
        return value

    def number(self, name, default):
        """Return the value of a keyword if it is a finite number. Raise Damage if not."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise Damage(f'{name} is {value!r}, not a number')
        return value

    @property
    def is_picture(self):
        """Whether the data are an array of at least two dimensions, compressed or not."""
        is_array = self.start == 0 or str(self.get('XTENSION')).strip() == 'IMAGE'
        return self.get('ZIMAGE') is True or is_array and len(self.axes) > 1 and math.prod(self.axes) > 0


def parse_card(card):
    """Return the value of a card of 80 bytes: bool, int, float or str, or None if it is undefined.

    A value that does not follow the standard is returned as text.
    """
    text = card[10:].decode('ascii', 'replace')
    if quoted := re.match(r" *'((?:[^']|'')*)'", text):
        return quoted[1].replace("''", "'").rstrip()
    word = text.partition('/')[0].strip()
    if word in ('T', 'F'):
        return word == 'T'
    if re.fullmatch(r'[+-]?[0-9]+', word):
        return int(word)
    if re.fullmatch(r'[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([ED][+-]?[0-9]+)?', word):
        return float(word.replace('D', 'E'))
    return word or None


def read_header(file, start):
    """Return the FitsHeader at an offset of a RandomAccess. Raise Damage if there is none, or its data are cut."""
    cards, n = [], FITS_BLOCK // FITS_CARD
    while not any(ends := [card.rstrip() == b'END' for card in cards[-n:]]):
        if len(cards) == MOST_CARDS:
            raise Damage(f'no END in {len(cards)} cards of the header')
        block = file.read(start + len(cards) * FITS_CARD, FITS_BLOCK)
        if not cards and not block.startswith((b'SIMPLE  =', b'XTENSION=')):
            raise Damage(f'no header at byte {start}')
        cards += [block[i:i + FITS_CARD] for i in range(0, FITS_BLOCK, FITS_CARD)]
    data = start + len(cards) * FITS_CARD
    cards = cards[:len(cards) - n + ends.index(True)]
    valued = {card[:8]: card for card in reversed(cards) if card[8:9] == b'='}
    header = FitsHeader(cards, valued, start, data)
    bits, n_axes = header.whole_number('BITPIX'), header.whole_number('NAXIS')
    if bits not in (8, 16, 32, 64, -32, -64) or not 0 <= n_axes <= 999:
        raise Damage(f'BITPIX is {bits}, and NAXIS is {n_axes}')
    axes = [header.whole_number(f'NAXIS{i + 1}') for i in range(n_axes)]
    groups, extra = header.whole_number('GCOUNT', 1), header.whole_number('PCOUNT', 0)
    if min(groups, extra, *axes) < 0:
        raise Damage('negative sizes')
    if header.get('GROUPS') is True and axes[:1] == [0]:
        raise RmgradientError('random groups, not a picture; save one as FITS or TIFF')
    size = abs(bits) // 8 * groups * (extra + math.prod(axes)) if axes else 0
    if data + size > file.size:
        raise Damage(f'its data end at byte {data + size} of a file of {file.size}')
    return header._replace(axes=axes, end=data + size)


def gunzip(path):
    """Unpack a FITS file from a gzip file. Return a temporary file."""
    import gzip
    import tempfile
    target = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with gzip.open(path) as source:
            data = source.read(FITS_BLOCK)
            if not data.startswith(b'SIMPLE  ='):
                raise RmgradientError('a gzip file that has no FITS file in it; unpack it: gunzip '
                                      f'{shlex.quote(os.fspath(path))}')
            most = max(LEAST_GZIPPED, MOST_GZIPPED * os.path.getsize(path))
            while data:
                target.write(data)
                if target.tell() > most:
                    raise RmgradientError(f'is more than {most} bytes after unpacking, which no picture has')
                if target.tell() % 2**28 < 2**20 and shutil.disk_usage(tempfile.gettempdir()).free < 2**30:
                    raise RmgradientError('there is not enough disk space for temporary files')
                data = source.read(2**20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        target.close()
        raise RmgradientError('damaged: it cannot be unpacked') from error
    except BaseException:
        target.close()
        raise
    target.flush()
    return target


def unpack_in_child(file):
    """Unpack the first compressed image of a FITS file. Return a temporary file.

    Another process does it, since the library can write beyond its memory if a file is damaged.
    """
    import subprocess
    import tempfile
    if not importlib.util.find_spec('astropy'):
        raise RmgradientError(f'astropy is missing; run: {how_to_install("astropy")}')
    target = tempfile.TemporaryFile()  # noqa: SIM115
    code = ('import importlib.util, sys; spec = importlib.util.spec_from_file_location("rmgradient", sys.argv[1]); '
            'module = importlib.util.module_from_spec(spec); sys.modules["rmgradient"] = module; '
            'spec.loader.exec_module(module); module.unpack_image(sys.stdin.buffer, sys.stdout.buffer)')
    try:
        file.seek(0)
        with tempfile.TemporaryDirectory() as home:  # astropy needs a folder for its settings
            places = dict.fromkeys(('HOME', 'XDG_CONFIG_HOME', 'XDG_CACHE_HOME'), home)
            done = subprocess.run([sys.executable, '-c', code, os.path.abspath(__file__)], stdin=file, stdout=target,
                                  stderr=subprocess.DEVNULL, env=os.environ | places)
        if done.returncode:
            raise Damage('its packed image cannot be unpacked')
    except BaseException:
        target.close()
        raise
    return target


def unpack_image(file, target):
    """Write the first compressed image of a FITS file as a plain FITS file.

    Memory: a few rows, and the tiles of the compression that include them.
    """
    from astropy.io import fits
    with warnings.catch_warnings(action='ignore'), fits.open(file, do_not_scale_image_data=True) as hdus:
        image = next(each for each in hdus if isinstance(each, fits.CompImageHDU))
        structure = re.compile('SIMPLE|XTENSION|BITPIX|NAXIS[0-9]*|PCOUNT|GCOUNT|CHECKSUM|DATASUM')
        shape = image.shape
        values = {'SIMPLE': 'T', 'BITPIX': image.header['BITPIX'], 'NAXIS': len(shape)}
        values |= {f'NAXIS{i + 1}': n for i, n in enumerate(reversed(shape))}
        cards = [f'{name:8}= {value:>20}'.ljust(FITS_CARD) for name, value in values.items()]
        cards += [card.image for card in image.header.cards if not structure.fullmatch(card.keyword)
                  and card.image.strip() != "EXTNAME = 'COMPRESSED_IMAGE'"]
        text = ''.join([*cards, 'END']).encode('ascii', 'replace')
        target.write(text.ljust(padded(len(text))))
        n_bytes = 0
        for plane in np.ndindex(shape[:-2]):
            for start in range(0, shape[-2], ROWS):
                rows = image.section[(*plane, slice(start, min(start + ROWS, shape[-2])))]
                n_bytes += target.write(np.ascontiguousarray(rows, rows.dtype.newbyteorder('>')))
        target.write(bytes(padded(n_bytes) - n_bytes))


def padded(size):
    """Round a number of bytes up to whole blocks of FITS."""
    return -(-size // FITS_BLOCK) * FITS_BLOCK


class FitsImage(FilePicture):
    """An open FITS picture: the primary array, or the first image extension if that is empty.

    It is gray or has three planes. Files packed by gzip or fpack are unpacked into a temporary file. `read` returns
    stored values, but applies the offset that makes integers unsigned. With a negative scale, values are inverted, so
    that light is positive. Rows are counted in the order of the file. Standard: Pence et al. 2010, Astronomy and
    Astrophysics 524, A42.
    """

    format, endings, beginning, _is_inverted = 'FITS', ('.fits', '.fit', '.fts'), rb'SIMPLE  =', False

    def _open(self):
        self._bytes = RandomAccess(self._file)
        self._header = header = self._find_picture()
        if header.get('ZIMAGE') is True:
            self._unpack(header)
            header = self._header
        if math.prod(header.axes[2:]) != 1 and (header.axes[2] != 3 or math.prod(header.axes[3:]) != 1):
            raise RmgradientError(f'a cube of {" x ".join(map(str, header.axes))}; save one plane, or three')
        width, height, self.n_samples = (*header.axes, 1)[:3]
        self.shape = height, width, self.n_samples
        bits, zero, scale = header.get('BITPIX'), header.number('BZERO', 0), header.number('BSCALE', 1)
        if not 1e-100 < abs(scale) < 1e100 or abs(zero) > 1e20 * abs(scale):
            raise RmgradientError(f'values are scaled by BSCALE {scale:g} and BZERO {zero:g}, so that nothing is left '
                                  'of them')
        kind = 'f' if bits < 0 else 'u' if bits == 8 else 'i'
        self._stored = np.dtype(f'>{kind}{abs(bits) // 8}')  # in the file
        self.dtype = self._stored.newbyteorder('=')
        # This offset makes integers unsigned, or bytes signed. With any other offset, stored values are corrected.
        if has_sign := scale == 1 and zero == {8: -128, 16: 2**15, 32: 2**31, 64: 2**63}.get(bits):
            self.dtype = np.dtype(f'{"i" if kind == "u" else "u"}{self.dtype.itemsize}')
        else:
            self.scale, self.zero, self._is_inverted = abs(scale), zero, scale < 0
            if self._is_inverted:
                self.zero += scale * float(self._invert(np.zeros(1, self.dtype))[0])
        if kind != 'f' and header.get('BLANK') is not None:
            blank, limits = header.whole_number('BLANK') + int(zero if has_sign else 0), np.iinfo(self.dtype)
            if limits.min <= blank <= limits.max:
                self.blank = int(self._invert(np.array([blank], self.dtype))[0]) if self._is_inverted else blank
        if self.n_samples == 1 and (names := [name for name in MOSAIC_CARDS if header.get(name)]) and (
                is_color_mosaic(self)):
            raise RmgradientError(f'raw colors of a color filter array ({names[0]} {header.get(names[0])}): debayer '
                                  'it first, for example with Siril')
        self.bottom_up = str(header.get('ROWORDER')).strip().upper() != 'TOP-DOWN'
        self.has_wcs = str(header.get('CTYPE1')).startswith(('RA--', 'DEC-', 'GLON', 'GLAT'))

    def _find_picture(self):
        """Return the header of the picture."""
        start, found = 0, []
        for _ in range(MOST_HEADERS):
            try:
                header = read_header(self._bytes, start)
                found += [header] if header.is_picture else []
            except Exception:
                if not found:
                    raise
                break  # headers after the picture are copied unread
            start = padded(header.end)
            if start >= self._bytes.size:
                break
        if not found:
            raise RmgradientError('there is no picture in it, only tables or nothing')
        if len(found) > 1:
            self.remarks.append(f'only the first of {len(found)} pictures is corrected, the others are copied')
        return found[0]

    def wcs(self):
        if not importlib.util.find_spec('astropy'):
            raise RmgradientError(f'coordinates in the sky (WCS) need astropy; run: {how_to_install("astropy")}')
        try:
            with no_warnings():
                import astropy.io.fits
                import astropy.wcs
                text = b''.join(self._header.cards).decode('ascii', 'replace')
                wcs = astropy.wcs.WCS(astropy.io.fits.Header.fromstring(text)).celestial
                usable = wcs.has_celestial and abs(np.linalg.det(wcs.pixel_scale_matrix)) > 0
        except Exception as error:  # astropy raises several on odd headers
            raise NotRegistered('its coordinates in the sky (WCS) cannot be read') from error
        if not usable:
            raise NotRegistered('its coordinates in the sky (WCS) cannot be used')
        return wcs

    def read(self, start, stop, left=0, right=None):
        height, width, planes = self.shape
        n_columns, item = (right or width) - left, self._stored.itemsize
        window = np.empty((stop - start, n_columns, planes), self._stored.newbyteorder('='))
        step = stop - start if n_columns == width else 1  # rows that are read in one call
        for plane, row in itertools.product(range(planes), range(0, stop - start, step)):
            first = (plane * height + start + row) * width + left
            with self._damage():
                data = self._bytes.read(self._header.data + first * item, step * n_columns * item)
            window[row:row + step, :, plane] = np.frombuffer(data, self._stored).reshape(-1, n_columns)
        return self._invert(window) if self._is_inverted else turn_sign(window, self.dtype)

    @staticmethod
    def _invert(values):
        return -values if values.dtype.kind == 'f' else ~values

    def _unpack(self, header):
        """Unpack an image compressed by fpack, and open the result."""
        axes = [header.whole_number(f'ZNAXIS{i + 1}') for i in range(header.whole_number('ZNAXIS'))]
        size = math.prod(axes) * abs(header.whole_number('ZBITPIX')) // 8
        if not 0 < size <= MOST_PACKED * self._bytes.size:
            raise Damage(f'an image of {size} bytes packed into {self._bytes.size}')
        if header.whole_number('TFIELDS', 1) > 999:
            raise Damage('more columns than a table can have')
        packed, self._file = self._file, unpack_in_child(self._file)
        packed.close()
        self._bytes = RandomAccess(self._file)
        self._header = self._find_picture()

    def write(self, file, strip_at, kind, settings):
        """Write strips as a FITS like this one into a seekable file, see `FilePicture.write`.

        All other headers and data are copied. Cards are copied, except those that describe the old pixels. A HISTORY
        card is added. The file is not compressed.
        """
        header, height = self._header, self.shape[0]
        cards, is_stale = [], False
        for card in header.cards:
            is_stale = card[:8] in STALE_CARDS or is_stale and card.startswith(b'CONTINUE')
            cards += [] if is_stale else [card]
        what = 'background gradient ' + ('removed' if kind == 'output' else 'of the picture')
        history = f'HISTORY rmgradient {__version__}: {what}'.encode().ljust(FITS_CARD)
        text = b''.join([*cards, history, b'END'])
        self._copy(file, 0, header.start)
        file.write(text.ljust(padded(len(text))))
        begin, row = file.tell(), 0

        def encoding(start, stop):
            planes = np.ascontiguousarray(strip_at(start, stop).transpose(2, 0, 1))
            planes = self._invert(planes) if self._is_inverted else planes
            return turn_sign(planes, self._stored.newbyteorder('=')).astype(self._stored)

        for planes in self.each_strip(encoding, settings.rows):
            for i, plane in enumerate(planes):
                file.seek(begin + (i * height + row) * plane[0].nbytes)
                file.write(plane)
            row += planes.shape[1]
        size = math.prod(header.axes) * self._stored.itemsize
        file.seek(begin + size)
        self._copy(file, header.data + size, self._bytes.size)
        end = file.tell()
        file.write(bytes(padded(end) - end))

    def _copy(self, file, start, stop):
        for offset in range(start, stop, 2**20):
            with about(self.path):
                data = self._bytes.read(offset, min(2**20, stop - offset))
            file.write(data)


def turn_sign(values, dtype):
    """Convert integers to a dtype of the same size. If the sign differs, add half of their range."""
    if values.dtype == dtype:
        return values
    unsigned = values.view(f'u{dtype.itemsize}')
    return (unsigned ^ unsigned.dtype.type(1 << 8 * dtype.itemsize - 1)).view(dtype)


# ---- Formats -------------------------------------------------------------------------------------

# Other files, by their first bytes, and how to convert them.
OTHER_FORMATS = {
    rb'\xff\xd8\xff': 'is a JPEG picture of 8 bits; save the original as TIFF or FITS, or run: convert FILE TARGET',
    rb'\x89PNG': 'is a PNG picture; save the original as TIFF or FITS, or run: convert FILE TARGET',
    rb'XISF0': 'is an XISF picture; save it as FITS or TIFF with PixInsight or Siril',
    rb'8BPS': 'is a Photoshop picture; save it as TIFF',
    rb'SIMPLE  = +F': 'is not a standard FITS file',
    rb'BZh': 'is compressed by bzip2; unpack it: bunzip2 FILE',
    rb'....ftyp(heic|heix|mif1|avif)': 'is a HEIF picture; convert it to TIFF',
    rb'II\*\0....CR|....ftypcrx|FUJIFILM|IIR[OS]|MMOR|IIU\0|\0MRM|FOVb':
        'is a camera raw picture; develop it with Siril or RawTherapee, or run: dcraw -T -4 FILE'}
FORMATS = TiffImage, FitsImage
ENDINGS = {'JPEG': ('.jpg', '.jpeg'), 'PNG': ('.png',), 'GIF': ('.gif',), 'BMP': ('.bmp',), 'WebP': ('.webp',),
           'HEIF': ('.heic', '.heif', '.avif'), 'XISF': ('.xisf',), 'Photoshop': ('.psd',), 'JPEG 2000': ('.jp2',),
           'JPEG XL': ('.jxl',), 'compressed FITS': ('.fz', '.gz'), **{each.format: each.endings for each in FORMATS}}


def open_picture(path: str | os.PathLike[str]) -> Picture:
    """Open a TIFF or FITS picture. Close it, or use it in a `with` statement.

    Raises RmgradientError if it is another file, is damaged or not supported, and OSError if it cannot be opened.
    """
    path = os.fspath(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        what = 'is a folder; name the pictures in it' if os.path.isdir(path) else 'is not a regular file'
        raise RmgradientError(what)
    with open(path, 'rb') as file:
        head = file.read(32)
    if not head:
        raise RmgradientError('is empty')
    for pattern, what in OTHER_FORMATS.items():
        if re.match(pattern, head, re.DOTALL):
            stem, ending = os.path.splitext(path)
            # The advice must not replace the picture, as it would if a JPEG is called .tif.
            target = shlex.quote(f'{stem}{"_converted" * (ending.lower() == ".tif")}.tif')
            raise RmgradientError(what.replace('FILE', shlex.quote(path)).replace('TARGET', target))
    if head.startswith(b'\x1f\x8b'):
        return FitsImage(path, gunzip(path))
    for kind in FORMATS:
        if re.match(kind.beginning, head):
            return kind(path)
    raise RmgradientError(f'is not a {" or ".join(kind.format for kind in FORMATS)} picture')


def check_output(picture, path, compress):
    """Raise RmgradientError if the ending of an output, or the compression, does not fit the format."""
    if compress and not picture.can_compress:
        raise RmgradientError(f'{picture.format} is written without compression; leave out --compress')
    ending = os.path.splitext(path)[1].lower()
    for name, endings in ENDINGS.items():
        if ending in endings and name != picture.format:
            raise RmgradientError(f'a {picture.format} picture is written as {picture.format}, not {name}; '
                                  f'name it {picture.endings[0]}')


# ---- Files ---------------------------------------------------------------------------------------

def check_paths(inputs, outputs, overwrite):
    """Raise RmgradientError if an output cannot be written, or would damage an input or another output."""
    sources = {_identity(path): path for path in inputs if os.path.exists(path)}
    places = {}
    for path in outputs:
        with about(path):
            real, exists = os.path.realpath(path), os.path.exists(path)
            folder = os.path.dirname(real)
            if not os.path.isdir(folder):
                raise RmgradientError(f'there is no folder {folder}')
            if os.path.isdir(path):
                raise RmgradientError('is a folder; name a file')
            if not os.path.basename(path):
                raise RmgradientError('there is no such folder')
            if is_device(path):
                continue
            place = _identity(path) if exists else os.path.normcase(real)
            if place in sources:
                raise RmgradientError(f'is the input {sources[place]}; choose another name or folder for the output')
            if place in places:
                raise RmgradientError('is named for two outputs' if path == places[place] else
                                      f'is the same file as {places[place]}; choose another name')
            places[place] = path
            if exists and not overwrite:
                raise RmgradientError('already exists; choose another name or use --overwrite')
            if exists and not os.path.isfile(path):
                raise RmgradientError('is not a regular file')
            if not os.access(folder, os.W_OK | os.X_OK):
                raise RmgradientError(f'no permission to write in the folder {folder}')
            if exists and not _may_replace(real, folder):
                raise RmgradientError(f'no permission to replace a file of another user in the folder {folder}')


def _identity(path):
    """Return device and inode of a file, which do not depend on its name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _may_replace(path, folder):
    """Whether we may replace a file. In a sticky folder, files of others may not be replaced."""
    owners = 0, os.stat(path).st_uid, os.stat(folder).st_uid
    is_sticky = os.stat(folder).st_mode & stat.S_ISVTX
    return not is_sticky or not hasattr(os, 'geteuid') or os.geteuid() in owners


def is_device(path):
    """Whether a path is a device. Devices are written to, not replaced."""
    return os.path.exists(path) and stat.S_ISCHR(os.stat(path).st_mode)


@contextlib.contextmanager
def whole_files(outputs, overwrite):
    """Yield files to write, {key: file} for {key: path}. They appear complete at the end of the block, or not at all.

    `check_paths` checks the paths. Each file has a hidden random name in the folder of its path until all files are
    complete and synchronized. A symbolic link stays, and its target is written. If files may not be replaced, a file
    that appears meanwhile is an error.
    """
    with contextlib.ExitStack() as stack:
        files, hidden = {}, {}
        for key, path in outputs.items():
            with about(path):
                name, mode, flags = path, 0o666, os.O_RDWR | getattr(os, 'O_BINARY', 0)
                if not is_device(path):
                    folder = os.path.dirname(os.path.realpath(path))
                    name = hidden[path] = os.path.join(folder, f'.rmgradient-{os.urandom(8).hex()}')
                    mode, flags = 0o600 if os.path.exists(path) else 0o666, flags | os.O_CREAT | os.O_EXCL
                if path in hidden:
                    stack.callback(_remove, name)  # before the file exists: a signal may come at any time
                descriptor = os.open(name, flags, mode)
                files[key] = os.fdopen(descriptor, 'w+b')
                stack.callback(_close, files[key])
        yield files
        for key, path in outputs.items():
            with about(path):
                files[key].flush()
                if path in hidden:
                    os.fsync(files[key].fileno())
                files[key].close()
        signals = []
        # Signals wait until all files have their names.
        with signals_handled(lambda number, _: signals.append(number)):
            for path, name in hidden.items():
                with about(path):
                    _publish(name, os.path.realpath(path), overwrite)
            for folder in {os.path.dirname(name) for name in hidden.values()}:
                with about(folder):
                    _sync_folder(folder)
        if signals:
            interrupt(signals[0], None)


def _publish(name, path, overwrite):
    """Give a complete file its path. Its hidden name may remain."""
    try:
        if not (overwrite and os.path.exists(path)):
            return _link(name, path)
    except FileExistsError:  # a file with this name appeared meanwhile
        if not overwrite:
            raise
    # The new file gets mode, access list and extended attributes of the old file, and its owner where that is allowed.
    replaced = os.stat(path)
    for owner in (replaced.st_uid, -1):
        with contextlib.suppress(OSError, AttributeError):  # not allowed, or Windows
            os.chown(name, owner, replaced.st_gid)
            break
    shutil.copystat(path, name)
    os.utime(name)
    return os.replace(name, path)


def _link(name, path):
    """Give a file a new name, unless a file has it."""
    try:
        os.link(name, path)
    except OSError as error:
        # Errors for file systems without links, such as exFAT: Linux, macOS, FUSE, Windows.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        if os.path.lexists(path):  # another program could create it after this test
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(name, path)


def _remove(path):
    with contextlib.suppress(OSError):
        os.remove(path)


def _sync_folder(folder):
    """Make new names in a folder durable. This does nothing on Windows, and in folders that cannot be read."""
    if not hasattr(os, 'O_DIRECTORY') or not os.access(folder, os.R_OK):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system does not support it
            raise
    finally:
        os.close(descriptor)


def _close(file):
    """Close a file that is not needed, and ignore errors."""
    with contextlib.suppress(OSError):
        file.close()


# ---- Display -------------------------------------------------------------------------------------

MASK_TINT = 0.0, 0.25, 0.1  # color added to areas that are not measured


class Binned(NamedTuple):
    """A window of a picture in larger pixels, for the screen."""

    values: np.ndarray  # (height, width, n_channels) float64: means of finite pixels of a few rows; NaN if none is
    factor: int  # pixels along a side of a large pixel
    untouched: np.ndarray  # (height, width) bool: pixels that are not changed, see `Picture.untouched`
    masked: np.ndarray | None  # (height, width) bool; None without a mask


def read_binned(picture, window=None, n=1000):
    """Return a window of a picture, Binned to at most about n x n pixels.

    The window is (left, right, top, bottom), by default the whole picture.
    """
    left, right, top, bottom = window or (0, picture.shape[1], 0, picture.shape[0])
    factor, columns = max(1, -(-max(right - left, bottom - top) // n)), slice(left, right)
    edges, values, untouched, masked = np.arange(0, right - left, factor), [], [], []
    for start in range(top, bottom, factor):
        # Only a few rows of each block are read, so that a large picture opens as fast as a small one.
        rows = slice(start, min(start + min(factor, 4 if factor < 8 else 1), bottom))
        samples = picture.read(rows.start, rows.stop, left, right)
        color = samples[..., :picture.shape[2]].astype(float)
        finite = np.isfinite(color) if picture.blank is None else np.isfinite(color) & (color != picture.blank)
        total, number = (np.add.reduceat(each.sum(axis=0), edges, axis=0)
                         for each in (np.where(finite, color, 0), finite.astype(float)))
        values.append(np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0))
        untouched.append(picture.untouched(samples, rows, columns)[0, ::factor])
        if picture.mask is not None:
            masked.append(picture.is_masked(slice(start, start + 1), columns)[0, ::factor])
    return Binned(np.stack(values), factor, np.stack(untouched), np.stack(masked) if masked else None)


def correct_binned(correction, binned, background):
    """Return the corrected values of a Binned picture, and where they became black and where white, bool."""
    dtype = correction.picture.dtype
    lowest, highest = range_of(dtype) if dtype.kind in 'ui' else (0, 1)
    with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
        after = correction.leveled(binned.values, background - correction.sky)
    if not correction.settings.is_classic:
        after = np.where(binned.untouched[..., None], binned.values, after)
    before = binned.values
    return after, *(new.any(axis=2) for new in ((after <= lowest) & (before > lowest),
                                                (after >= highest) & (before < highest)))


def in_colors(picture):
    """Return a picture with values in 0 ... 1 as red, green and blue."""
    n_channels = picture.shape[2]
    return picture[..., :3].copy() if n_channels >= 3 else np.repeat(picture[..., :1], 3, axis=2)


def tint(picture, areas, white=1):
    """Make areas, (height, width) bool, of a (height, width, 3) picture green in place."""
    picture[areas] = 0.6 * picture[areas] + white * np.array(MASK_TINT)


def stretch_midtones(picture, like=None):
    """Stretch a picture to 0 ... 1 so that faint light is visible, with one curve for all channels.

    This is the usual screen transfer function. Black is 2.8 standard deviations (see `robust_std`) below the median. A
    midtones transfer function maps the median to 1/4. If `like` is another picture, its curve is used.
    """
    values = (picture if like is None else like).ravel()
    most = values.max(where=np.isfinite(values), initial=-np.inf)
    values = values[::max(1, len(values) // 10**5)]  # enough for medians
    values = values[np.isfinite(values)]
    if not values.size:
        return np.zeros(picture.shape)
    median = np.median(values)
    black = max(median - 2.8 * robust_std(values - median), values.min())
    scale = max(most - black, TINY)
    middle = min(max((median - black) / scale, 1e-6), 0.999)
    midtones = 3 * middle / (2 * middle + 1)  # solves (m - 1) x / ((2 m - 1) x - m) = 1/4 for m at x = middle
    x = np.clip((picture - black) / scale, 0, 1)
    return np.clip((midtones - 1) * x / ((2 * midtones - 1) * x - midtones), 0, 1)


def draw_points(axes, points, bad, radius):
    """Draw points (bad ones red), rings around the averaged areas, and isolines. Return the artists, points last."""
    from matplotlib.collections import EllipseCollection, LineCollection
    colors = np.where(np.isin(np.arange(len(points.x)), bad), 'red', 'orange')
    measured = ~points.on_isoline
    rings = EllipseCollection(2 * radius, 2 * radius, 0, units='xy', offsets=points.centers[measured],
                              transOffset=axes.transData, facecolors='none', edgecolors=colors[measured])
    isolines = [points.centers[points.leader == first] for first in np.unique(points.leader)]
    return [axes.add_collection(LineCollection(isolines, colors='orange', linewidths=1)),
            axes.add_collection(rings), axes.scatter(points.x[bad], points.y[bad], s=80, c='red', marker='x'),
            axes.scatter(points.x, points.y, s=2, c=colors)]


def number_points(axes, points, colors, indices):
    """Write the numbers of points, given by indices, next to them, unless it would cover another number.

    The first ones are never left out.
    """
    from matplotlib.patheffects import withStroke
    outline, taken = [withStroke(linewidth=2, foreground='black')], np.empty((0, 4))
    axes.apply_aspect()  # now places on the figure are final
    places = axes.transData.transform(points.centers) * 72 / axes.figure.dpi  # typographic points, as text sizes
    for i in indices:
        text, (x, y) = str(i + 1), places[i]
        width, height = 5.2 * len(text) + 1, 8.0  # of 8 point digits, and a gap
        for dx, dy in ((3, 3), (-3 - width, 3), (3, -3 - height), (-3 - width, -3 - height)):
            left, bottom, right, top = box = x + dx, y + dy, x + dx + width, y + dy + height
            if not ((left < taken[:, 2]) & (taken[:, 0] < right) & (bottom < taken[:, 3]) & (taken[:, 1] < top)).any():
                taken = np.vstack([taken, box])
                axes.annotate(text, points.centers[i], (dx, dy), textcoords='offset points', color=colors[i],
                              fontsize=8, path_effects=outline)
                break


def draw_preview(file, kind, picture, correction):
    """Draw the picture with its points, the background with contour lines, and the result into a binary file.

    Kind is 'png', 'pdf' or 'svg'. Points that do not fit are red. Pixels that became black are blue. Raises
    RmgradientError if matplotlib fails.
    """
    with default_style():
        try:
            figure = preview_figure(picture, correction)
            figure.savefig(file, format=kind, dpi=130)
        except (MemoryError, OSError):
            raise
        except Exception as error:  # matplotlib raises many types
            if isinstance(error, ValueError) and 'array' in str(error):  # not enough memory for an array
                raise MemoryError from error
            raise RmgradientError(f'cannot be drawn by matplotlib ({type(error).__name__})') from error


def preview_figure(picture, correction):
    """Return the matplotlib Figure of a preview, see `draw_preview`."""
    from matplotlib.figure import Figure

    height, width, _ = picture.shape
    binned = read_binned(picture)
    before, factor = binned.values, binned.factor
    background = correction.model.shrunk(factor).evaluate(0, *before.shape[:2])
    after, black, _ = correct_binned(correction, binned, background)
    misfits = [i for i, _ in correction.misfits]
    panel = 6 * np.array([width, height]) / max(width, height)
    grid = (3, 1) if width > 2.5 * height else (1, 3)
    size = np.maximum(panel, 2.5) * grid[::-1] + 1
    figure, (left, bottom) = Figure(figsize=size), 0.6 / size  # a layout by matplotlib would take long
    figure.subplots_adjust(left, bottom, 1 - left / 4, 1 - bottom / 1.5, 0.04, 0.15)
    stretched = [in_colors(each) for each in (
        stretch_midtones(before), stretch_midtones(background, before), stretch_midtones(after))]
    stretched[2][black] = 0, 0.2, 1
    hidden = binned.untouched if binned.masked is None else binned.untouched | binned.masked
    tint(stretched[0], hidden)
    sky = picture.physical(correction.sky)
    level = in_words(sky[:1] if np.ptp(sky) == 0 else sky)
    panels = figure.subplots(*grid, sharex=True, sharey=True)
    titles = ('before' + (', green: not measured' if hidden.any() else '')
              + (', red: points that do not fit' if misfits else ''), 'background',
              f'after, sky level {level}' + (', blue: became black' if 100 * black.mean() >= LEAST_LIMITED else ''))
    for axes, each, title in zip(panels, stretched, titles):
        axes.imshow(each, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation='nearest')
        axes.set_title(title)
        axes.set_autoscale_on(False)
    if picture.bottom_up:
        panels[0].invert_yaxis()
    radius = math.ceil(3 * correction.settings.sigma)
    places = draw_points(panels[0], correction.points, misfits, radius)[-1]
    # Misfits get their numbers first: users look for these.
    indices = sorted(range(len(correction.points.x)), key=lambda i: i not in misfits)
    number_points(panels[0], correction.points, places.get_facecolors(), indices)
    draw_contours(panels[1], background.mean(axis=2), factor)
    return figure


def draw_contours(axes, background, factor):
    """Draw contour lines of a binned background, (height, width), with their levels, unless it is flat."""
    if np.ptp(background) <= 1e-9 * np.abs(background).max() or min(background.shape) < 2:
        return
    y, x = (factor * (np.arange(n) + 0.5) - 0.5 for n in background.shape)
    lines = axes.contour(x, y, background, 8, colors='white', linewidths=0.7)
    middle = np.array([x.mean(), y.mean()])
    places = [min(path.vertices, key=lambda place: np.hypot(*(place - middle)))
              for path in lines.get_paths() if len(path.vertices)]
    # Lines near the border get no label: the border would cut it.
    places = [place for place in places if (np.abs(place - middle) < 0.43 * np.array([np.ptp(x), np.ptp(y)])).all()]
    axes.clabel(lines, fontsize=7, fmt=lambda value: in_words([value]), manual=places)


def load_matplotlib():
    """Load matplotlib, without the backend of the user, which may fail. Raise RmgradientError if it is missing."""
    named = os.environ.pop('MPLBACKEND', None)
    try:
        with no_warnings():  # about settings of the user
            import matplotlib
            import matplotlib.figure  # noqa: F401
    except Exception as error:
        raise RmgradientError(why_not_loaded(error)) from error
    finally:
        if named is not None:
            os.environ['MPLBACKEND'] = named


@contextlib.contextmanager
def default_style():
    """Draw with the default settings of matplotlib: with some settings of users, drawing fails."""
    import matplotlib
    with no_warnings(), matplotlib.rc_context():  # warnings about missing glyphs
        matplotlib.rcdefaults()  # all but the backend
        matplotlib.rcParams['toolbar'] = 'toolbar2'
        yield


def choose_toolkit():
    """Make matplotlib use a toolkit with windows. Raise RmgradientError if none can be used."""
    load_matplotlib()
    import matplotlib
    from matplotlib.backend_bases import NavigationToolbar2
    # These buttons would save the figure instead of the points, and move the panels.
    NavigationToolbar2.toolitems = [each for each in NavigationToolbar2.toolitems
                                    if each[0] not in ('Save', 'Subplots')]
    named, displays = os.environ.get('MPLBACKEND'), ('DISPLAY', 'WAYLAND_DISPLAY')
    if not named and sys.platform not in ('win32', 'darwin') and not any(map(os.environ.get, displays)):
        raise RmgradientError('--edit needs a display; without one, MPLBACKEND=WebAgg uses a browser; run: '
                              f'{how_to_install("tornado")}')
    for backend in [named] if named else ['TkAgg', 'QtAgg']:
        with contextlib.suppress(Exception):  # each toolkit raises its own
            import matplotlib.pyplot as plt
            plt.switch_backend(backend)
            plt.close(plt.figure())
            if matplotlib.get_backend().lower() not in 'agg cairo pdf pgf ps svg template'.split():
                return
    if named:
        needed = how_to_install('tornado' if named.lower() == 'webagg' else 'PySide6')
        raise RmgradientError(f'--edit cannot use MPLBACKEND={named}; unset it, or run: {needed}')
    if importlib.util.find_spec('_tkinter'):
        raise RmgradientError(f'--edit cannot open the display {os.environ.get("DISPLAY", "")}')
    raise RmgradientError('--edit needs a toolkit for windows; run: apt install python3-tk, or: '
                          f'{how_to_install("PySide6")}')


# For pages of WebAgg: keys go to the picture, also after a click on a button of the toolbar. No menu of file formats.
PAGE_SCRIPT = """
document.addEventListener('click', (event) => {
    if (event.target.closest('button')) document.querySelector('[tabindex]').focus();
});
window.addEventListener('load', () => document.querySelector('select').remove());
"""


def show_window(figure):
    """Show a figure in its window or browser page, until it is closed."""
    import matplotlib
    if matplotlib.get_backend().lower() != 'webagg':
        matplotlib.pyplot.show(block=True)
        return
    # The show() of WebAgg goes on when the figure is closed, catches Ctrl-C, and can start a browser in a terminal.
    import tornado.ioloop
    from matplotlib.backends import backend_webagg as webagg
    loop, server, manager = tornado.ioloop.IOLoop.current(), webagg.WebAggApplication, figure.canvas.manager
    manager.ToolbarCls.toolitems = [each for each in manager.ToolbarCls.toolitems if each[0] != 'Download']
    script = webagg.core.FigureManagerWebAgg.get_javascript()
    if PAGE_SCRIPT not in script:
        webagg.core.FigureManagerWebAgg.get_javascript = lambda: script + PAGE_SCRIPT

    def close():
        manager.set_window_title('Done: close this page, or reload it for the next picture')
        loop.stop()

    manager.destroy = close
    server.initialize()
    logger.info('open http://%s:%d in a browser; Ctrl-C stops', server.address, server.port)
    loop.start()


def _kind_of(points):
    """Return the fields of Points that their coordinates do not include."""
    return {'least_shape': points.least_shape, 'is_chosen': points.is_chosen}


class Editor:
    """A window to set points by hand. It shows the picture, and next to it the result or the background.

    It starts with Points or pairs (see `make_points`) of a Picture. The function `save` writes Points and returns the
    name of the file. `accepted` tells whether Enter closed the window.
    """

    saves_on_enter = False

    HELP = ('click: add, Shift-click: add to the isoline, drag: move, right click or Delete: remove, Ctrl-Z: undo, '
            'Ctrl-Y: redo\na: automatic points, v: view, s: save points, Enter: write the outputs, Escape: close')

    def __init__(self, picture, points, settings, save):
        import matplotlib.pyplot as plt
        self.picture, self.settings, self._save = picture, settings, save
        self._title, self.correction = os.path.basename(picture.path), None
        self._kept = _kind_of(points) if isinstance(points, Points) else {}  # its pairs do not include this
        pairs = points.pairs if isinstance(points, Points) else points
        self.pairs, self.accepted, self._shows_result = np.asarray(pairs, float).reshape(-1, 2), False, True
        self._done, self._undone, self._saved, self._drawn = [], [], self.pairs, []
        self._measured, self._dragged, self._window = {}, None, None
        self._asked = False
        height, width, _ = picture.shape
        # The whole picture, and the part of it that is visible: as many pixels as the screen shows.
        self._binned = self._visible = read_binned(picture, n=700)
        # With the window's own borders and buttons it fits a screen of 1366 x 768.
        self.figure, (self.left, self.right) = plt.subplots(1, 2, figsize=(12.8, 6), sharex=True, sharey=True)
        self.figure.subplots_adjust(0.01, 0.12, 0.99, 0.95, 0.02)  # room for titles, however the picture is zoomed
        self.status = self.figure.supxlabel(self.HELP, fontsize=9)
        for text in (self.status, self.left.title, self.right.title):
            text.set_parse_math(False)  # names of files may contain $
        stretched, frame = self._stretch(self._binned.values), (-0.5, width - 0.5, height - 0.5, -0.5)
        self._images = [axes.imshow(stretched, cmap='gray', vmin=0, vmax=255, extent=frame,
                                    interpolation='nearest') for axes in self.figure.axes]
        self.left.set_autoscale_on(False)
        if picture.bottom_up:
            self.left.invert_yaxis()
        for axes in self.figure.axes:
            axes.set_axis_off()  # drawing labels takes longest
        canvas = self.figure.canvas
        if canvas.manager:
            canvas.manager.set_window_title(f'rmgradient: {self._title}')
        if handler := getattr(canvas.manager, 'key_press_handler_id', None):
            canvas.mpl_disconnect(handler)  # its keys would conflict with ours; the buttons of the toolbar stay
        for event, react in (('button_press_event', self._press), ('motion_notify_event', self._drag),
                             ('button_release_event', self._release), ('figure_leave_event', self._release),
                             ('key_press_event', self._key)):
            canvas.mpl_connect(event, react)
        # One timer that fires once collects events, so that there is one refit for all of them.
        self.timer = canvas.new_timer(interval=30)
        self.timer.single_shot = True
        self.timer.add_callback(self.update)
        for name in ('xlim_changed', 'ylim_changed'):
            self.left.callbacks.connect(name, lambda _: self.timer.start())
        self.update()

    @staticmethod
    def _stretch(picture, like=None):
        stretched = np.nan_to_num(255 * stretch_midtones(picture, like))
        stretched = stretched.astype(np.uint8)  # drawn faster than floats
        return stretched[..., 0] if stretched.shape[2] < 3 else stretched[..., :3]

    def _stretch_with_mask(self, binned):
        """Return a Binned picture, stretched like the whole picture, with masked areas tinted."""
        stretched = self._stretch(binned.values, self._binned.values)
        if binned.masked is not None and binned.masked.any():
            stretched = in_colors(np.atleast_3d(stretched))
            tint(stretched, binned.masked, 255)
        return stretched

    def points(self, least=3):
        """Return the valid points, see `make_points`."""
        points = make_points(np.delete(self.pairs, list(self.unusable), axis=0), least=least)
        return points._replace(**self._kept)

    def update(self):
        """Measure new points, fit, and draw."""
        unusable, self.misfits, self.correction = self.unusable, [], None
        self._read_window()
        try:
            measured = self._measure_points(self.points())
            self.correction = correction_of(self.picture, measured, self.settings)
            text = f'{len(measured.points.x)} points in use; {self.correction.verdict.text}'
            self._correct_shown()
            if shown := [each for each in (*self.correction.findings, *self.findings)
                         if each.severity == 'warning' and each.kind != 'misfit']:
                text = shown[0].text + f'; fit: {self.correction.verdict.numbers["word"]}'
            usable = np.delete(np.arange(len(self.pairs)), list(unusable)).tolist()
            self.misfits = [usable[i] for i, _ in self.correction.misfits]
        except RmgradientError as error:
            text = self._without_advice(error)
        reasons = dict.fromkeys(self.misfits, 'does not fit the others (not on empty sky?)') | unusable
        self._draw(list(reasons))
        for i in sorted(reasons)[-2:]:
            x, y = np.abs(self.pairs[i]).astype(int)
            text += f'; point {i + 1} at ({x}, {y}) {reasons[i]}'
        self._say(text)
        self.left.set_title(self._title + ('' if self._is_saved() else ' - points not saved'), fontsize=10)
        self.figure.canvas.draw_idle()

    @staticmethod
    def _without_advice(error):
        """Return the message of an error without its advice, which may be an option that the window does not have."""
        return str(error).partition('; ')[0]

    def _correct_shown(self):
        """Correct the whole picture and the visible part, and make findings about the values."""
        binned = self._binned
        background, self._result, *limited = self._correct(binned, (0, 0))
        share = [math.prod(self.picture.shape[:2]) * each[~binned.untouched].sum() / each.size for each in limited]
        self.findings = check_limits(self.correction, self.picture, [*share, 0])
        self._visible_background, self._visible_result = background, self._result
        if self._visible is not binned:
            left, _, top, _ = self._window
            self._visible_background, self._visible_result, *_ = self._correct(self._visible, (left, top))

    def _correct(self, binned, corner):
        """Return background and result of a Binned part of the picture, and where it became black and where white."""
        model = self.correction.model.shrunk(binned.factor, *corner)
        background = model.evaluate(0, *binned.values.shape[:2])
        return background, *correct_binned(self.correction, binned, background)

    def _is_saved(self):
        return np.array_equal(self._saved, self.pairs)

    @property
    def unusable(self):
        """{index: reason} of the points that cannot be used. New points are measured."""
        reasons, seen, leader = {}, set(), 0
        height, width, _ = self.picture.shape
        for i, (pair, place) in enumerate(zip(self.pairs, np.abs(self.pairs).astype(int).tolist())):
            on_isoline, place = np.signbit(pair).any(), tuple(place)
            leader = leader if on_isoline else i
            if place in seen:
                reasons[i] = 'repeats another point'
            elif on_isoline and not (place[0] < width and place[1] < height):
                reasons[i] = 'is outside of the picture'
            elif on_isoline and leader in reasons:
                reasons[i] = 'is on the isoline of one that cannot be used'
            elif not on_isoline and isinstance(levels := self._measure(place), str):
                reasons[i] = levels
            seen.add(place)
        return reasons

    def _measure(self, place):
        """Return the Window of a place, or the reason why there is none. Each place is measured once."""
        if place not in self._measured:
            point, settings = unchecked_points([place]), self.settings
            kernel = blur_kernel(settings.sigma)
            try:
                check_points(point, *self.picture.shape[:2], len(kernel) // 2)
                self._measured[place] = measure_window(self.picture, place, kernel, settings.is_adaptive)
            except Unusable as error:
                self._measured[place] = self._without_advice(error)
            except RmgradientError as error:
                self._measured[place] = self._without_advice(error).partition(') ')[2]
        return self._measured[place]

    def _measure_points(self, points):
        """Return Measured of valid points."""
        places = points.centers.astype(int).tolist()
        return measured_from(points, {i: self._measure(tuple(place)) for i, place in enumerate(places)
                                      if not points.on_isoline[i]})

    def _draw(self, bad):
        for artist in self._drawn:
            artist.remove()
        points, radius = unchecked_points(self.pairs), math.ceil(3 * self.settings.sigma)
        self._drawn = draw_points(self.left, points, bad, radius)
        number_points(self.left, points, np.full(len(self.pairs), 'red'), bad)  # the message has these numbers
        self._drawn += self.left.texts[:]
        shown, like, name = self._visible.values, self._binned.values, 'give at least three points'
        if self.correction:
            shown, name = self._visible_background, 'background (v: result)'
            if self._shows_result:
                shown, like, name = self._visible_result, self._result, 'result (v: background)'
        self._images[1].set_data(self._stretch(shown, like))
        self.right.set_title(name, fontsize=10)

    def _read_window(self):
        """Read and show the visible part of the picture, with all of its pixels if they are few enough."""
        height, width, _ = self.picture.shape
        (x0, x1), (y0, y1) = sorted(self.left.get_xlim()), sorted(self.left.get_ylim())
        left, right = max(0, math.floor(x0)), min(width, math.ceil(x1) + 1)
        top, bottom = max(0, math.floor(y0)), min(height, math.ceil(y1) + 1)
        window = left, right, top, bottom
        if left < right and top < bottom and window != self._window:
            self._window, is_whole = window, window == (0, width, 0, height)
            self._visible = part = self._binned if is_whole else read_binned(self.picture, self._window, 700)
            height, width = part.untouched.shape
            self._images[0].set_data(self._stretch_with_mask(part))
            for image in self._images:
                image.set_extent((left - 0.5, left + part.factor * width - 0.5,
                                  top + part.factor * height - 0.5, top - 0.5))

    def _change(self, pairs, before=None):
        """Take new pairs, and keep the old ones for undo."""
        self._done.append(self.pairs if before is None else before)
        self.pairs, self._undone, self._asked = pairs, [], False
        self.timer.start()

    def _point_at(self, event):
        """Return the index of the point within ten screen pixels of the pointer, or None."""
        if event.xdata is None or not len(self.pairs):
            return None
        distances = np.hypot(*(np.abs(self.pairs) - [event.xdata, event.ydata]).T)
        reach = 10 * abs(np.diff(self.left.get_xlim())[0]) / max(1, self.left.bbox.width)
        return int(distances.argmin()) if distances.min() <= reach else None

    def _press(self, event):
        if event.inaxes not in (self.left, self.right) or getattr(self.figure.canvas.toolbar, 'mode', ''):
            return  # outside, or for zoom and pan of the toolbar
        if event.dblclick:  # browsers send it after two clicks, and no release follows
            return
        at, x, y = self._point_at(event), round(event.xdata), round(event.ydata)
        is_inside = 0 <= x < self.picture.shape[1] and 0 <= y < self.picture.shape[0]
        if event.button == 3 and at is not None:
            self._change(remove_pair(self.pairs, at))
        elif event.button == 1 and at is not None:
            self._dragged = at, self.pairs
        elif event.button == 1 and is_inside:
            is_shifted = event.key == 'shift' or 'shift' in event.modifiers  # pressed here, or outside the picture
            sign = -1.0 if is_shifted and len(self.pairs) else 1.0  # the first starts an isoline
            self._change(np.vstack([self.pairs, [sign * x, sign * y]]))

    def _drag(self, event):
        if self._dragged and event.xdata is not None:
            height, width, _ = self.picture.shape
            place = np.clip([round(event.xdata), round(event.ydata)], 0, [width - 1, height - 1])
            i, self.pairs = self._dragged[0], self.pairs.copy()
            self.pairs[i] = np.copysign(place, -1.0 if np.signbit(self.pairs[i]).any() else 1.0)
            self.timer.start()

    def _release(self, _):
        if self._dragged and not np.array_equal(self._dragged[1], self.pairs):
            self._change(self.pairs, before=self._dragged[1])
        self._dragged = None

    def _key(self, event):
        key = (event.key or '').replace('ctrl+Z', 'ctrl+shift+z').lower().replace('cmd', 'ctrl')
        self._release(None)
        try:
            if key in ('delete', 'backspace') and (at := self._point_at(event)) is not None:
                self._change(remove_pair(self.pairs, at))
            elif key in ('ctrl+z', 'ctrl+y', 'ctrl+shift+z'):
                source, target = (self._done, self._undone) if key == 'ctrl+z' else (self._undone, self._done)
                if source:
                    target.append(self.pairs)
                    self.pairs = source.pop()
            elif key == 'a':
                given = self.points(least=1) if len(self.pairs) > len(self.unusable) else None
                n, sigma = self.settings.auto or AUTO, self.settings.sigma
                points = choose_points(self.picture, n, sigma, given).points
                self._kept = _kind_of(points)
                self._change(points.pairs)
            elif key == 'v':
                self._shows_result = not self._shows_result
            elif key == 's':
                return self.save()
            elif key == 'escape' and not self._is_saved() and not self._asked:
                self._asked = True
                self._say('points are not saved: press s to save them, or Escape again to close')
                return None
            elif key in ('enter', 'return', 'escape'):
                accepts = key != 'escape' and bool(self.points())  # an error if there are too few
                is_new = self.settings.auto is not None or not self._is_saved()
                if accepts and self.saves_on_enter and is_new:
                    self.save()
                import matplotlib.pyplot as plt
                self.accepted = accepts
                return plt.close(self.figure)
            self.timer.start()
        except (RmgradientError, OSError) as error:
            self._say(self._without_advice(error))
        return None

    def _say(self, text):
        """Show a message below the picture."""
        lines = textwrap.wrap(text, 190)  # as many characters as the window is wide
        self.status.set_text('\n'.join([*lines[:2], self.HELP]))
        self.figure.canvas.draw_idle()

    def save(self):
        """Save the valid points."""
        name, self._saved = self._save(self.points()), self.pairs
        self.update()
        left_out = f', without {len(self.unusable)} that cannot be used' if self.unusable else ''
        self._say(f'{name} written{left_out}')


# ---- Pipeline ------------------------------------------------------------------------------------

OUTPUTS = {'output': '', 'background': '', 'save_points': '.txt', 'preview': '.png'}  # endings in a folder


class Job(NamedTuple):
    """A picture and its outputs."""

    path: str
    outputs: dict[str, str]  # paths by kind, see `OUTPUTS`


class Given(NamedTuple):
    """Points of the user."""

    points: Points | None
    size: tuple[int, int] | None = None  # height and width of the picture that they were saved for


def process(options):
    """Run a command line. The options are those of `build_parser`."""
    jobs = list_jobs(options)
    inputs = [path for path in (*options.input, options.reference, options.mask) if path]
    if options.points_file not in (None, '-', options.save_points):
        inputs.append(options.points_file)  # otherwise it is read before it is replaced
    outputs = [path for job in jobs for path in job.outputs.values()]
    check_paths(inputs, [*outputs, *([options.report] if options.report else [])], options.overwrite)
    if options.preview:
        with about(options.preview):
            load_matplotlib()
    if options.edit:
        choose_toolkit()
    if len(jobs) > 1 or options.edit:  # garbage collection was disabled at the imports
        gc.enable()
    given = read_points(options)
    alone, n_failed, reports = len(jobs) == 1, 0, []
    with open_other(options.reference) as reference:
        for job in progress_bar('picture', shown=not alone)(jobs, len(jobs)):
            try:
                with about(job.path):
                    reports.append(process_picture(job, given, options, reference))
            except (RmgradientError, MemoryError, ImportError) as error:
                if alone:
                    raise
                logger.error('%s', explain(error, job.path))
                reports.append({'picture': job.path, 'error': str(explain(error, job.path))})
                n_failed += 1
    if options.report:
        write_report(reports, options)
    if n_failed:
        others = '; the others are done' if n_failed < len(jobs) else ''
        raise RmgradientError(f'{n_failed} of {len(jobs)} pictures failed{others}')


def write_report(reports, options):
    """Write one line with a JSON object for each picture that was corrected or failed."""
    import json
    lines = [json.dumps(as_json(report), allow_nan=False) for report in reports if report]
    with about(options.report), whole_files({'report': options.report}, options.overwrite) as files:
        files['report'].write(''.join(f'{line}\n' for line in lines).encode('ascii'))
    logger.info('%s: written', options.report)


def list_jobs(options):
    """Return a Job for each picture. An output that is a folder gets the name of the picture."""
    names = [os.path.normcase(plain_name(path)) for path in options.input]
    for i, name in enumerate(names):
        if (first := names.index(name)) != i:
            if options.input[first] == options.input[i]:
                raise NamedError(f'{options.input[i]}: is named twice')
            raise RmgradientError(f'{options.input[first]} and {options.input[i]} have the same name, and so would '
                                  'their outputs; correct them one after the other')
    several, jobs = len(options.input) > 1, []
    for path in options.input:
        name, outputs = plain_name(path), {}
        for kind, ending in OUTPUTS.items():
            if output := getattr(options, kind):
                if os.path.isdir(output):
                    output = os.path.join(output, os.path.splitext(name)[0] + ending if ending else name)
                elif several:
                    raise NamedError(f'{output}: is not a folder; for several pictures, name an existing folder')
                outputs[kind] = output
        jobs.append(Job(path, outputs))
    return jobs


def plain_name(path):
    """Return the name of a picture without its folder, .gz and .fz, for a folder of outputs."""
    name = os.path.basename(path)
    stem, ending = os.path.splitext(name)
    if ending.lower() not in ('.gz', '.fz'):
        return name
    return stem if stem.lower().endswith(FitsImage.endings) else stem + FitsImage.endings[0]


def settings_of(options):
    """Return the Settings of a command line."""
    return Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})


def process_picture(job, given, options, reference):
    """Correct one picture, and return its report. Show a progress bar if it is the only picture."""
    settings, picture = settings_of(options), open_picture(job.path)
    megapixels = f' {picture.shape[0] * picture.shape[1] / 1e6:.3g} megapixels'
    with (picture, threads(progress_bar('strip', megapixels, shown=len(options.input) == 1)) as picture.starmap,
          open_mask(options.mask, picture) as mask):
        if mask:
            picture.mask = mask.flipped if mask.bottom_up != picture.bottom_up else mask
            if picture.masked_share == 1:
                raise RmgradientError(f'the mask {mask.path} has no pixel that is 0; sky must be 0')
            logger.info('%s: %.3g %% of the picture is masked', picture.path, 100 * picture.masked_share)
        check_outputs(picture, job, options)
        early = check_options(picture, given, options)
        show(picture, early)
        if picture.bottom_up and (given.points or options.edit or 'save_points' in job.outputs):
            logger.info('%s: y of points counts from the bottom row, which is stored first', picture.path)
        if reference:
            with about(reference.path):
                check_reference(picture.shape, reference.shape)
            reference.starmap = picture.starmap
            correction = correct_with_reference(picture, given.points, settings, reference)
            measured = correction.fit.measured
            if measured.reference.where:
                logger.info('%s: the reference is %s', picture.path, measured.reference.where)
        elif given.points is not None or settings.auto is not None:
            measured = measure_points(picture, given.points, settings)
        if (given.points is not None or settings.auto is not None) and (chosen := measured.chosen):
            logger.info('%s: %d points chosen from %d quiet places%s', picture.path,
                        len(measured.points.x) - chosen.n_given, chosen.n_places,
                        f' in addition to {chosen.n_given} given' if chosen.n_given else '')
        if options.edit:
            points = edit_points(picture, measured.points if settings.auto is not None else given.points, job, options)
            if points is None:
                return None
            measured = measure_levels(picture, points, settings.sigma, settings.is_adaptive)
        if not reference:
            correction = correction_of(picture, measured, settings)
        show(picture, [correction.verdict, *correction.findings])
        log_details(picture, correction)
        preview, failure = None, None
        if 'preview' in job.outputs:
            try:
                preview = encode_preview(job.outputs['preview'], picture, correction)
            except RmgradientError as error:  # the other outputs are written first
                failure = error
                del job.outputs['preview']
        with whole_files(job.outputs, options.overwrite) as files:
            counts = write_pictures(job.outputs, files, picture, correction)
            if 'save_points' in files:
                with about(job.outputs['save_points']):
                    files['save_points'].write(encode_points(picture, correction.points, settings))
            if preview:
                with about(job.outputs['preview']):
                    files['preview'].write(preview)
        late = check_limits(correction, picture, counts)
    show(picture, late)
    for kind, path in job.outputs.items():
        level = f'; sky level {in_words(picture.physical(correction.sky))}' if kind == 'output' else ''
        logger.info('%s: written%s', path, level)
    if failure:
        raise failure
    files = {name: getattr(options, name) for name in ('points_file', 'mask', 'reference')}
    return report_of(job, correction, counts, [*early, *correction.findings, *late]) | {'files': files}


def open_other(path):
    """Return a context manager of an open mask or reference, or of None if there is none."""
    if not path:
        return contextlib.nullcontext()
    with about(path):
        return open_picture(path)


@contextlib.contextmanager
def open_mask(path, picture):
    """Yield the open mask of a picture, or None if there is none."""
    with open_other(path) as mask:
        if mask:
            with about(path):
                check_mask(picture.shape, mask.shape)
            mask.starmap = picture.starmap
        yield mask


def check_mask(shape, mask_shape):
    """Raise RmgradientError unless a mask has the size of the picture."""
    if mask_shape[:2] != shape[:2]:
        raise RmgradientError(f'has {mask_shape[1]} x {mask_shape[0]} pixels, but the picture has {shape[1]} x '
                              f'{shape[0]}; a mask needs the same size')


def check_outputs(picture, job, options):
    """Raise RmgradientError if options of the outputs do not fit the picture. This is before anything slow."""
    for kind in [kind for kind in ('output', 'background') if kind in job.outputs]:
        with about(job.outputs[kind]):
            check_output(picture, job.outputs[kind], options.compress)
    check_sky(options.sky, picture)


def check_options(picture, given, options):
    """Return Findings about options that do not fit the picture."""
    findings = []
    if given.size not in (None, picture.shape[:2]):
        saved, ours = (f'{size[1]} x {size[0]} pixels' for size in (given.size, picture.shape))
        findings.append(Finding('size', f'the points were saved for a picture of {saved}, and this one has {ours}',
                                'look at --preview'))
    if options.dither and picture.dtype.kind == 'f':
        findings.append(Finding('dither', 'floating point numbers are not rounded', 'leave --dither out'))
    return findings


def show(picture, findings):
    """Log Findings of a picture."""
    for finding in findings:
        logger.log(logging.WARNING if finding.severity == 'warning' else logging.INFO, '%s: %s', picture.path, finding)


def edit_points(picture, points, job, options):
    """Let the user set points in a window. Return them, or None if it was closed without Enter."""
    name = job.outputs.get('save_points') or os.path.splitext(job.path)[0] + '_points.txt'
    if not job.outputs:
        logger.info('%s: without -o no picture is written; Enter saves the points', job.path)
    settings, overwrite, is_saved = settings_of(options), options.overwrite, False

    def save(points):
        nonlocal overwrite, is_saved
        replaces, overwrite = overwrite, True  # our own file, or the second request
        if os.path.isfile(name) and not replaces:
            raise RmgradientError(f'{name} exists, press s again to replace it')
        check_paths([job.path], [name], replaces)
        with whole_files({'points': name}, replaces) as files:
            files['points'].write(encode_points(picture, points, settings))
        is_saved = True
        logger.info('%s: written', name)
        return name

    with default_style():
        editor = Editor(picture, points or [], settings, save)
        editor.saves_on_enter = not job.outputs
        show_window(editor.figure)
    if not editor.accepted:
        logger.info('%s: closed; %s', job.path, 'only the points are written' if is_saved else 'nothing written')
        return None
    if editor.unusable:
        logger.warning('%s: %d points that cannot be used are left out', job.path, len(editor.unusable))
    if job.outputs.pop('save_points', None):
        editor.save()
    return editor.points()


def encode_preview(path, picture, correction):
    """Return the bytes of a preview, in the format of its path."""
    file = io.BytesIO()
    with about(path):
        draw_preview(file, os.path.splitext(path)[1][1:].lower(), picture, correction)
    return file.getvalue()


def read_points(options):
    """Return the points Given by -p or -f."""
    least = 3 if options.auto is None and not options.edit else 1
    if options.points is not None:
        return Given(make_points(options.points, least=least))
    if options.points_file is None:
        return Given(None)
    is_stream = options.points_file == '-'
    name = 'standard input' if is_stream else options.points_file
    stream = sys.stdin.buffer if sys.stdin else io.BytesIO()
    with about(name), contextlib.nullcontext(stream) if is_stream else open(name, 'rb') as file:
        data = file.read(MOST_POINTS * 200 + 1)
        if len(data) > MOST_POINTS * 200:
            raise RmgradientError(f'is not a file of points: it has more than {MOST_POINTS * 200} bytes')
        lines = re.split('\r\n?|\n', data.decode('utf-8-sig', 'replace'))
        pairs, line_numbers = parse_points_file(lines)
        most = 2 if len(pairs) > 2 and (np.diff(pairs[:, 0]) == 1).all() else 3
        if any(count_numbers(line) > most for line in lines):
            logger.warning('%s: some lines have more than a pair of numbers; only the first two are used%s',
                           name, ': are the first ones the numbers of the points?' if most == 2 else '')
        points = make_points(pairs, [f'{name}, line {i}' for i in line_numbers], least)
    saved = re.match(r'# .*, (\d{1,9}) x (\d{1,9}) pixels, sigma ([\d.]+)(, chosen automatically)?'
                     r'(?:, shape at least (\d{1,9}(?:\.\d*)?))?$', lines[0])
    if saved and saved[3] != f'{options.sigma:g}':
        logger.warning('%s: the points were saved with --sigma %s, and are used with %g', name, saved[3],
                       options.sigma)
    if saved:
        points = points._replace(is_chosen=bool(saved[4]), least_shape=float(saved[5] or 0))
    return Given(points, saved and (int(saved[2]), int(saved[1])))


def encode_points(picture, points, settings):
    """Return the bytes of a file of points in the format of -f."""
    height, width, _ = picture.shape
    lines = [f'# {printable(os.path.basename(picture.path))}, {width} x {height} pixels, sigma {settings.sigma:g}',
             *format_points_file(points)]
    if points.is_chosen:
        lines[0] += ', chosen automatically'
    if points.least_shape:
        lines[0] += f', shape at least {points.least_shape:g}'
    return ('\n'.join(lines) + '\n').encode('utf-8', 'replace')


def write_pictures(outputs, files, picture, correction):
    """Write the corrected picture and the background, one after the other.

    Returns the numbers of pixels that became black, that became white, and whose background did not fit in the type.
    Memory: a few strips for each worker.
    """
    counts = [np.zeros(3, int)]

    def correcting(start, stop):
        with about(picture.path):
            strip, n_limited = correction.corrected_strip(picture, start, stop)
        counts.append([*n_limited, 0])
        return strip

    def evaluating(start, stop):
        strip, n_unfit = correction.background_strip(picture, start, stop)
        counts.append([0, 0, n_unfit])
        return strip

    for kind, strip_at in (('output', correcting), ('background', evaluating)):
        if kind in files:
            with about(outputs[kind]):
                picture.write(files[kind], strip_at, kind, correction.settings)
    return np.sum(counts, axis=0)


def is_terminal(stream):
    """Whether a stream is a terminal. It may be None or closed."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError, OSError):
        return False


def progress_bar(unit, text='', shown=True):
    """Return a function that adds a progress bar to an iterable, if standard error is a terminal."""
    if not (shown and is_terminal(sys.stderr) and logger.isEnabledFor(logging.INFO)):
        return lambda results, *_: results
    from tqdm import tqdm  # takes longer to import than most pictures to correct
    return lambda results, total, work='': tqdm(
        results, desc=f'{work}{text}', total=total, unit=unit, delay=1, leave=False)


def log_details(picture, correction):
    """Log details of the model, for --verbose."""
    fit = correction.fit
    if fit.reference:
        logger.debug('%s: %d of %d points fit the reference, whose scale is %s', picture.path, fit.reference.kept.sum(),
                     len(fit.reference.kept), fit.reference.scales)
    if fit.adaptive:
        smooth = np.format_float_positional(fit.adaptive.smooth, 2, fractional=False, trim='-')
        logger.debug('%s: model: %s and a multiquadric of shape %.0f pixels and smoothness %s', picture.path,
                     fit.adaptive.trend, fit.adaptive.epsilon, smooth)
        logger.debug('%s: leave-one-out errors of the points: %s (RMS); standard errors of their levels: %s',
                     picture.path, in_words(picture.scale * rms(fit.adaptive.errors)),
                     in_words(picture.scale * np.median(fit.measured.noise, axis=0)))


def report_of(job, correction, counts, findings):
    """Return the report of a corrected picture, for --report, as a dict for `as_json`."""
    picture, fit, settings = correction.picture, correction.fit, correction.settings
    points, scale = fit.measured.points, picture.scale
    model = {'kind': 'classic', 'shape': fit.model.epsilon, 'smoothness': settings.smooth}
    if fit.adaptive:
        model = {'kind': 'adaptive', 'trend': fit.adaptive.trend, 'shape': fit.model.epsilon,
                 'smoothness': fit.adaptive.smooth}
    report = {
        'picture': job.path, 'outputs': job.outputs,
        'versions': {'rmgradient': __version__, 'python': sys.version.split()[0], 'numpy': np.__version__,
                     'tifffile': tifffile.__version__},
        'size': picture.shape[1::-1], 'channels': picture.shape[2], 'type': str(picture.dtype),
        'settings': dataclasses.asdict(settings), 'points': points.pairs, 'on_isoline': points.on_isoline,
        'levels': picture.physical(fit.measured.levels), 'noise': scale * fit.measured.noise,
        'residuals': None if fit.adaptive is None else scale * fit.adaptive.errors, 'model': model,
        'sky': picture.physical(correction.sky),
        'counts': dict(zip(('lowest', 'highest', 'background'), counts)),
        'verdict': correction.verdict, 'findings': findings}
    if fit.reference:
        report['reference'] = {'scale': fit.reference.scale, 'error': fit.reference.error,
                               'n_points': len(fit.reference.kept), 'n_kept': fit.reference.kept.sum()}
    return report


def as_json(value):
    """Convert a value to JSON types: arrays to lists, Findings to objects, numbers that are not finite to null."""
    if isinstance(value, Finding):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [as_json(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


# ---- Command line --------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """A parser that suggests options for misspelled ones, and escapes unprintable characters."""

    def error(self, message):
        if words := re.match('unrecognized arguments: (.*)', message):
            import difflib
            known = [option for action in self._actions for option in action.option_strings]
            for word in words[1].split():
                close = difflib.get_close_matches(word.partition('=')[0], known, 1)
                message += f'; did you mean {close[0]}?' if close else ''
                if re.match(r'-\d', word):
                    message += '; write coordinates with a minus sign as -330 -195'
        if 'required: -i' in message:
            message += '; write it before the names of the pictures'
        super().error(printable(message))


def build_parser():
    """Return the parser of the command line."""
    text = (__doc__ or '').rstrip()  # python -OO has no docstrings
    if not ''.join(sys.argv[:1]).endswith('.py'):  # installed
        text = text.replace('python rmgradient.py', 'rmgradient')
    parser = Parser(prog='rmgradient', description=text, add_help=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group('input and output')
    files.add_argument('-i', '--input', metavar='FILE', nargs='+', action='extend', required=True,
                       help='pictures to correct (TIFF or FITS)')
    files.add_argument('-o', '--output', metavar='FILE',
                       help='write the corrected picture, in the format and type of the input. For several pictures, '
                       'name an existing folder here, and for -b, --save-points and --preview')
    files.add_argument('-b', '--background', metavar='FILE',
                       help='also write the background that is removed: output = input - (background - sky level)')
    files.add_argument('-c', '--compress', metavar='LEVEL', type=number_from(0, 9, int), default=0,
                       help='compress the written files by deflate, level 1 to 9; 0 is none (default: %(default)s)')
    files.add_argument('--save-points', metavar='FILE', help='write the points, in the format of -f')
    files.add_argument('--preview', metavar='FILE', type=preview_name,
                       help='draw the picture with its points, the background, and the result (PNG, PDF or SVG; needs '
                       'matplotlib)')
    files.add_argument('--report', metavar='FILE',
                       help='write points, levels, model, warnings and quality of the fit as JSON, one line for each '
                       'picture')
    files.add_argument('--overwrite', action='store_true', help='replace existing files')

    choice = parser.add_argument_group('points', 'Give at least one of these. -a adds to the points of -p or -f.')
    given = choice.add_mutually_exclusive_group()
    given.add_argument('-p', '--points', metavar=('X', 'Y'), nargs='+', action='extend',
                       help='points of empty sky, in pixels')
    given.add_argument('-f', '--points-file', metavar='FILE',
                       help='read points from a file, one pair in each line; # starts a comment; - is standard input')
    choice.add_argument('-a', '--auto', metavar='N', nargs='?', const=0, type=number_from(3, MOST_CELLS, int),
                        help='choose points automatically, not on stars and nebulae: one from each cell of a grid with '
                        f'N cells along the longer side, 3 to {MOST_CELLS}, and more at borders (default: {AUTO}; '
                        f'{REFERENCE_AUTO} with --reference). Points of -p or -f are always kept')
    choice.add_argument('--edit', action='store_true',
                        help='set points by hand in a window that shows the result. It starts with the points of -p, '
                        '-f or -a, and lists its keys (needs matplotlib)')

    model = parser.add_argument_group('model')
    model.add_argument('-s', '--sigma', metavar='PIXELS', type=number_from(0.1, 10000), default=SIGMA,
                       help='standard deviation of the Gaussian blur at the points, in pixels (default: %(default)g)')
    model.add_argument('-m', '--smooth', metavar='NUMBER', type=number_from(0, 1e12, word='auto'),
                       default='auto',
                       help='auto: the adaptive model, fitted to each picture. A number: the model of rmgradient of '
                       '2019 with this smoothness, often 0.1 (default: %(default)s)')
    model.add_argument('-r', '--rows', metavar='N', type=number_from(1, 2**31, int), default=ROWS,
                       help='rows processed together; more rows take more memory (default: %(default)s)')
    model.add_argument('--mask', metavar='FILE',
                       help='picture of the same size (TIFF or FITS): 0 is sky, other pixels are not measured, for '
                       'example land, trees or a nebula. Masked pixels are corrected, too')
    model.add_argument('--reference', metavar='FILE',
                       help='picture of the same field with less gradient, gray or in the same colors. What it shows '
                       'is kept, even if a nebula fills the frame. If it is not registered, the program uses '
                       'coordinates (FITS) or stars (needs astroalign)')

    correction = parser.add_argument_group('correction')
    how = correction.add_mutually_exclusive_group()
    how.add_argument('--divide', dest='method', action='store_const', const='divide', default='subtract',
                     help='divide by the background instead of subtracting it, for vignetting: '
                     'output = input * sky level / background')
    how.add_argument('--stretch', dest='method', action='store_const', const='stretch',
                     help='after subtracting, scale each pixel so that white stays white (see --white)')
    correction.add_argument('--white', metavar='VALUE', type=number_from(TINY, 1e300),
                            help='value of white, for --stretch (default: the largest integer; 1.0 for floats)')
    correction.add_argument('--sky', metavar='LEVEL', type=sky_level,
                            help='level of the corrected sky: gray (the median level of the points, the same in all '
                            'channels), color (the median of each channel), darkest (the lowest background of each '
                            'channel), or a number. Default: gray; color with --divide; darkest with --smooth NUMBER; '
                            'with --reference, the level of the reference, if it has the same type')
    correction.add_argument('--dither', action='store_true',
                            help='add noise of one count before rounding to integers, so that smooth areas show no '
                            'steps')

    other = parser.add_argument_group('other')
    how_much = other.add_mutually_exclusive_group()
    how_much.add_argument('-q', '--quiet', action='store_true', help='show only errors and warnings')
    how_much.add_argument('-v', '--verbose', action='store_true', help='also show how the model was chosen')
    other.add_argument('--version', action='version', version=f'%(prog)s {__version__}', help='show the version')
    other.add_argument('-h', '--help', action='help', help='show this help')
    return parser


def number_from(lowest, highest, kind=float, word=None):
    """Return a function for argparse that converts text to a number in a range, or accepts a word."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if text == word or lowest <= kind(text) <= highest:
                return text if text == word else kind(text)
        what, also = 'whole number' if kind is int else 'number', f', or {word}' if word else ''
        also += '; is it a picture? Write its name after -i' if os.path.isfile(text) else ''
        raise argparse.ArgumentTypeError(f'{text!r} is not a {what} from {lowest:g} to '
                                         f'{in_words([highest])}{also}')
    return convert


def sky_level(text):
    """Return the word or the number of --sky, for argparse."""
    with contextlib.suppress(ValueError):
        if text in SKIES or math.isfinite(float(text)):
            return text if text in SKIES else float(text)
    raise argparse.ArgumentTypeError(f'{text!r} is neither a number nor one of {", ".join(SKIES)}')


def preview_name(path):
    """Return a path if it is a folder or ends like a preview, for argparse."""
    if not os.path.isdir(path) and os.path.splitext(path)[1].lower() not in ('.png', '.pdf', '.svg'):
        raise argparse.ArgumentTypeError(f'{path!r} does not end in .png, .pdf or .svg')
    return path


def main(argv: Sequence[str | os.PathLike[str]] | None = None) -> int:
    """Run a command line, by default `sys.argv`. Return the exit status.

    The arguments are those of the command, without its name. Messages go to standard error. Wrong usage raises
    SystemExit, and so do --help and --version.
    """
    parser = build_parser()
    options = parser.parse_args(None if argv is None else [os.fspath(word) for word in argv])
    outputs = [getattr(options, kind) for kind in OUTPUTS]
    files = [*options.input, *outputs, options.reference, options.mask, options.report]
    if '' in (*files, options.points_file):
        parser.error('the name of a file is empty')
    if '-' in files:
        parser.error('- is only for -f: pictures and outputs are files, name them (./- for a file called -)')
    if not (options.edit or any(outputs)):
        parser.error('nothing to write: give -o/--output, or --save-points, --preview or -b/--background')
    if options.points is None and options.points_file is None and options.auto is None and not options.edit:
        parser.error('one of the arguments -p/--points, -f/--points-file, -a/--auto and --edit is required')
    if options.reference is not None and options.edit:
        parser.error('--edit shows the picture without --reference: use one of them')
    if options.reference is not None and options.smooth != 'auto':
        parser.error('--reference needs --smooth auto')
    if options.white is not None and options.method != 'stretch':
        parser.error('--white is for --stretch')
    if options.points is not None:
        try:
            options.points = parse_coordinates(options.points)
        except RmgradientError as error:
            parser.error(f'argument -p/--points: {error}')
    with log_to_stderr(logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO):
        try:
            with signals_handled(interrupt):
                process(options)
            return 0
        except SystemExit as interruption:  # a signal, see `interrupt`
            return interruption.code
        except ImportError as error:  # some libraries are loaded when they are needed
            logger.error('%s', why_not_loaded(error))
        except (RmgradientError, OSError, MemoryError) as error:
            logger.error('%s', explain(error, options.input[0]))
        return 1


def explain(error, path):
    """Return the message of an error during the work on the picture at path."""
    if isinstance(error, OSError):
        return f'{error.filename}: {error.strerror}' if error.filename else error.strerror or error
    if isinstance(error, ImportError):
        return why_not_loaded(error)
    if isinstance(error, MemoryError):
        return f'{path}: not enough memory, or no more threads allowed; a smaller --rows may help'
    return error


@contextlib.contextmanager
def log_to_stderr(level):
    """Show our messages, one line each. Hide those of libraries, which report our errors again, or minor issues."""
    handler, silent = _Handler(), logging.CRITICAL + 1
    levels = {'rmgradient': level, 'tifffile': silent, 'matplotlib': silent}
    with contextlib.ExitStack() as restore:
        for name, level in levels.items():
            each = logging.getLogger(name)
            restore.callback(each.setLevel, each.level)
            each.setLevel(level)
        logger.addHandler(handler)
        restore.callback(logger.removeHandler, handler)
        yield


class _Handler(logging.StreamHandler):
    def format(self, record):
        kind = '' if record.levelno <= logging.INFO else f'{record.levelname.lower()}: '
        return f'rmgradient: {kind}{printable(record.getMessage())}'

    def emit(self, record):
        if 'tqdm' in sys.modules and is_terminal(self.stream):  # tqdm clears its progress bar first
            with contextlib.suppress(OSError):  # the terminal was closed
                sys.modules['tqdm'].tqdm.write(self.format(record), file=self.stream)
        else:
            super().emit(record)

    def handleError(self, record):  # noqa: N802
        """Ignore messages that cannot be written; main() reports memory errors."""
        if isinstance(sys.exc_info()[1], MemoryError):
            raise


def run():
    """Run as a command. Exit with its status."""
    sys.exit(main())


if __name__ == '__main__':
    run()
