"""The emulator reports what a GPU would refuse or leave undefined."""

import math
import re

import pytest

import emulator

pytestmark = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs the sources and x86-64")


@pytest.fixture
def em():
    loaded = emulator.load()
    loaded.set_device(90)
    loaded.set_schedule("forward")
    return loaded


def line(text: str, occurrence: int = 0) -> str:
    """Where `text` is in faults.cu, as reports have it."""
    lines = (emulator.HERE / "faults.cu").read_text().splitlines()
    return f"faults.cu:{[n for n, source in enumerate(lines, 1) if text in source][occurrence]}"


# A report names the kernel, the block and, for a barrier, the line.
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("exited thread", rf"block barrier: a thread waits at {line('__syncthreads')} .*block 0"),
        (
            "two barriers",
            rf"is at {line('__syncthreads', 2)}, another at {line('__syncthreads', 1)}",
        ),
        ("partial shuffle", rf"warp barrier: a thread waits at {line('shfl')}"),
        ("partial mask", rf"without the full mask at {line('shfl', 1)}"),
        ("misaligned read", r"misaligned read of 16 bytes .*fault_kernel, block 0, thread 0"),
        ("misaligned write", r"misaligned write of 16 bytes"),
        ("shared overrun", r"write behind the end of shared memory .*block 0"),
        ("early remote store", r"shared memory of a block that has not started"),
        ("late remote store", r"shared memory of a block that has ended .*block 1"),
        ("foreign block", r"a block outside the cluster"),
        ("no wait", r"two arrivals at the cluster barrier without a wait"),
        ("grid barrier", r"grid barrier in a launch that is not cooperative"),
    ],
)
def test_fault_is_reported(em, fault, expected):
    report = em.fault(fault)
    assert re.search(expected, report), report
    assert em.last_error() == 0  # the launcher took it off the runtime's record


def test_no_fault_no_report(em):
    assert em.fault("none") == ""


def test_shared_memory_starts_poisoned(em):
    assert em.fault("uninitialised") == ""
    assert math.isnan(em.first_global())


@pytest.mark.parametrize(
    ("capability", "shape", "error"),
    [
        (90, (8, 1024, 227 << 10, 8), ""),
        (90, (1, 32, (227 << 10) + 1, 1), "invalid argument"),
        (80, (1, 32, 163 << 10, 1), ""),
        (80, (1, 32, (163 << 10) + 1, 1), "invalid argument"),
        (120, (1, 32, (99 << 10) + 1, 1), "invalid argument"),
        (90, (1, 1056, 0, 1), "invalid configuration argument"),
        (90, (0, 32, 0, 1), "invalid configuration argument"),
        (90, (16, 32, 0, 16), "Invalid cluster size"),
        (90, (3, 32, 0, 2), "Invalid cluster size"),
        (80, (2, 32, 0, 2), "Invalid cluster size"),
        (90, (1 << 31, 32, 0, 1), "too many rows for one launch"),
        (80, (64, 1024, 0, 1, True), ""),
        (80, (65, 1024, 0, 1, True), "too many blocks in cooperative launch"),
        (80, (33, 32, 100 << 10, 1, True), "too many blocks in cooperative launch"),
        (120, (33, 1024, 0, 1, True), "too many blocks in cooperative launch"),
    ],
)
def test_launch_limits(em, capability, shape, error):
    em.set_device(capability)
    assert em.launch(*shape) == error
    assert em.last_error() == 0


def test_unknown_device(em):
    with pytest.raises(ValueError, match="80, 90, 100 or 120"):
        em.set_device(70)
