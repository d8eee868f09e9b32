# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from conftest import draw
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import rmgradient as rg

INTEGERS = ['u1', 'u2', 'u4', 'u8', 'i1', 'i2', 'i4', 'i8']


def exact(image, shift, dtype):
    """Return image - shift rounded and limited in exact integers, and how many were limited."""
    limits = np.iinfo(dtype)
    values = [int(i) - round(s) for i, s in zip(image.ravel().tolist(), shift.ravel().tolist())]
    limited = [min(max(value, limits.min), limits.max) for value in values]
    return np.array(limited, dtype).reshape(image.shape), sum(a != b for a, b in zip(values, limited))


@pytest.mark.parametrize('dtype', INTEGERS)
def test_integers_never_wrap(dtype):
    limits = np.iinfo(dtype)
    span = min(float(limits.max) - float(limits.min), 2.0**50)
    rng = np.random.default_rng(4)
    image = rng.integers(limits.min, limits.max, (20, 7, 3), dtype, endpoint=True)
    image[0, :2] = [[limits.min], [limits.max]]
    for most in (0.0, 0.4, 3.0, span / 3, span, 3 * span):
        shift = rng.uniform(0, most, image.shape) + 0.1  # no ties
        corrected, n_limited = rg.correct(image, shift)
        expected, n_expected = exact(image, shift, dtype)
        assert corrected.dtype == image.dtype
        assert_array_equal(corrected, expected)
        assert n_limited == n_expected


@pytest.mark.parametrize('dtype', ['f2', 'f4', 'f8'])
def test_floats_are_only_cast(dtype):
    image = np.array([[[0.5], [0.1], [np.nan], [np.inf], [-np.inf]]], dtype)
    corrected, n_limited = rg.correct(image, np.full(image.shape, 0.5))
    expected = np.array([[[0.0], [float(image[0, 1, 0]) - 0.5], [np.nan], [np.inf], [-np.inf]]]).astype(dtype)
    assert corrected.dtype == image.dtype
    assert_array_equal(corrected, expected)
    assert n_limited == 0


@given(st.integers(0, 65535), st.floats(0, 70000))
def test_rounding_is_to_nearest(value, shift):
    image = np.full((1, 1, 1), value, np.uint16)
    corrected, _ = rg.correct(image, np.full((1, 1, 1), shift))
    assert abs(int(corrected[0, 0, 0]) - max(0, value - shift)) <= 0.5


def test_background_keeps_within_its_dtype():
    values = np.array([-3.0, 0.4, 0.6, 254.6, 300.0])
    limited, n = rg.to_dtype(values, np.uint8)
    assert limited.tolist() == [0, 0, 1, 255, 255]
    assert n == 2
    assert rg.to_dtype(values, np.float32)[0].tolist() == np.float32(values).tolist()


def test_largest_integers_are_reached():
    assert rg.to_dtype(np.array([1e30, -1e30]), np.uint64)[0].tolist() == [2**64 - 2048, 0]
    assert rg.to_dtype(np.array([1e30]), np.uint32)[0].tolist() == [2**32 - 1]


def test_input_is_not_changed():
    image, background = draw()
    copies = image.copy(), background.copy()
    rg.correct(image, background)
    assert_array_equal(image, copies[0])
    assert_array_equal(background, copies[1])
