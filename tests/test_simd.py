"""The vector exp and tanh, at every instruction set, against float64."""

import timeit

import numpy as np
import pytest

from mtp_fast import _C


def _apply(tanh: bool, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    _C.simd_function(tanh, x.ctypes.data, y.ctypes.data, x.size)
    return y


def _floats(low: float, high: float, step: int) -> np.ndarray:
    """Every step-th float32 of [low, high], both signs."""
    bits = np.arange(0, np.float32(max(-low, high)).view(np.uint32), step, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    return np.ascontiguousarray(x[(x >= low) & (x <= high)])


def _ulps(got: np.ndarray, truth: np.ndarray) -> float:
    return float(np.max(np.abs(got - truth) / np.spacing(np.abs(truth).astype(np.float32))))


def test_exp_is_within_2_ulp(simd_level: str) -> None:
    x = _floats(-86.6, 88.7, 211)
    assert x.size > 5_000_000
    assert _ulps(_apply(False, x), np.exp(x.astype(np.float64))) < 2.0


def test_exp_near_and_past_its_range(simd_level: str) -> None:
    x = np.array([-np.inf, -1e30, -86.7, np.nan, 0.0, -0.0], np.float32)
    assert _apply(False, x).tolist()[:3] == [0.0, 0.0, 0.0]
    assert np.isnan(_apply(False, x)[3])
    assert _apply(False, x).tolist()[4:] == [1.0, 1.0]


def test_exponentials_that_vanish_take_no_longer(simd_level: str) -> None:
    """Subnormal numbers take processors 200 cycles, and so does what only just becomes 0."""
    seconds = {}
    for value in (-1.0, -88.0, -100.0, -200.0, -np.inf):
        x = np.full(1 << 16, value, np.float32)
        seconds[value] = min(timeit.repeat(lambda x=x: _apply(False, x), number=1, repeat=50))
    assert max(seconds.values()) < 4 * seconds[-1.0]


def test_tanh_is_within_4_ulp(simd_level: str) -> None:
    x = _floats(-20.0, 20.0, 211)
    x = x[np.abs(x) > 1e-30]
    assert _ulps(_apply(True, x), np.tanh(x.astype(np.float64))) < 4.0


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_tanh_of_infinity(simd_level: str, value: float) -> None:
    assert _apply(True, np.array([value], np.float32))[0] == np.sign(value)
