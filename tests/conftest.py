"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest
import torch

import mtp_fast
from mtp_fast import _C

SIMD_LEVELS = mtp_fast.build_info()["simd_levels"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=range(len(SIMD_LEVELS)), ids=SIMD_LEVELS)
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with every instruction set of this machine."""
    _C.set_simd_level(request.param)
    yield SIMD_LEVELS[request.param]
    _C.set_simd_level(len(SIMD_LEVELS) - 1)
