"""Fixtures for all tests."""

import zlib
from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config

import emulator
import mtp_fast
from mtp_fast import _C

# What is cached between runs calls the backward ops as they were when it was compiled.
torch._functorch.config.enable_autograd_cache = False

SIMD_LEVELS = mtp_fast.build_info()["simd_levels"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _at_level(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.config.getoption("--emulated") and request.param > 0:
        pytest.skip("the CUDA kernels have no instruction sets")
    _C.set_simd_level(request.param)
    yield SIMD_LEVELS[request.param]
    _C.set_simd_level(len(SIMD_LEVELS) - 1)


COMPILED_LEVELS = [level for level in SIMD_LEVELS if level != "amx"]


@pytest.fixture(params=range(len(COMPILED_LEVELS)), ids=COMPILED_LEVELS)
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with every instruction set of this machine."""
    yield from _at_level(request)


@pytest.fixture(params=range(len(SIMD_LEVELS)), ids=SIMD_LEVELS)
def decode_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for the kernels that have a use for AMX."""
    yield from _at_level(request)


@pytest.fixture(params=["kernels", "torch"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode once with what runs the layers on a CPU, once with what runs them on a GPU."""
    if request.param == "torch":
        monkeypatch.setattr("mtp_fast.decoding.incremental.runs_on_cpu", lambda *unused: False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated",
        nargs="?",
        const="forward",
        choices=(*emulator.SCHEDULES, "mixed"),
        help="run the ops through the CUDA kernels, on the CPU (tests/emulator), in this order; "
        "mixed: each test in one that its name decides",
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if schedule := request.config.getoption("--emulated"):
        emulator.load().install(monkeypatch)
        if schedule == "mixed":
            names = zlib.crc32(request.node.nodeid.encode())
            schedule = emulator.SCHEDULES[names % len(emulator.SCHEDULES)]
        emulator.load().set_schedule(schedule)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and what is slow unless it is asked for."""
    wants_slow = config.getoption("--slow") or "slow" in config.option.markexpr
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and not wants_slow:
            item.add_marker(pytest.mark.skip(reason="slow: asked for with --slow"))
