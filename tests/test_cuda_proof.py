"""The proof of the CUDA kernels without a GPU, in one command:

    pytest --slow tests/test_cuda_proof.py

All tests of the ops run through the emulated kernels three times, once under each schedule. They
run a fourth time, and the tests of the kernels with them, under AddressSanitizer and
UndefinedBehaviorSanitizer, each then under the one schedule that its name decides. Statistical
tests draw a 1000th of what they draw on the CPU: that the kernels draw as the CPU does is the
business of test_cuda_acceptance.py.

Without --slow the tests of the interfaces alone run so, under one schedule: a test that holds on
the CPU only is noticed before the proof is repeated.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

import emulator

pytestmark = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs the sources and x86-64")

OPS = ("cross_entropy", "linear_cross_entropy", "multi_token_cross_entropy", "acceptance")
OPS += ("linear_cross_entropy_interface", "acceptance_interface", "acceptance_distribution")
OP_TESTS = [f"test_{op}.py" for op in OPS]
INTERFACE_TESTS = [name for name in OP_TESTS if name.endswith("_interface.py")]
KERNELS = ("cuda_cross_entropy", "cuda_acceptance", "progress")
KERNEL_TESTS = [f"test_{name}.py" for name in KERNELS]
# What holds on the CPU alone (ignored rows cost nothing, bad targets raise), what tests the
# reference or, with faults of its own, the tests, and what measures memory, in processes of its own
# that know no emulator.
LEFT_OUT = ("products_that_nobody_needs", "chunks_span_heads", "IndexError", "out_of_range")
LEFT_OUT += ("planted_fault", "keyed_by_absolute_position", "superfluous")
LEFT_OUT += ("memory_bound", "four_heads_need_one_weight_gradient")

Done = subprocess.CompletedProcess[str]


def run(tests: list[str], environment: dict[str, str], *options: str) -> Done:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda"]
    command += ["-k", " and ".join(f"not {name}" for name in LEFT_OUT), *options, *tests]
    environment = {**environment, "OMP_NUM_THREADS": "1"}  # as many runs as cores
    # Not from the root: the package's source there would hide the package that is installed.
    return subprocess.run(
        command, cwd=emulator.HERE.parent, env=environment, capture_output=True, text=True
    )


def on_emulated_kernels() -> dict[str, str]:
    """The environment of a process that calls them in place of a device's."""
    return {**os.environ, "MTP_EMULATOR_LIBRARY": str(emulator.build("plain"))}


def check(done: Done) -> None:
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


def test_interfaces_are_those_of_the_cpu() -> None:
    check(run(INTERFACE_TESTS, on_emulated_kernels(), "--emulated", "shuffled"))


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment of a process that has the sanitizers from its start."""
    library = str(emulator.build("sanitized", sanitize=True))
    return {**emulator.sanitizer_environment(), "MTP_EMULATOR_LIBRARY": library}


def run_sanitized(environment: dict[str, str]) -> Done:
    done = run(OP_TESTS, environment, "--emulated", "mixed")
    if done.returncode != 0:
        return done
    return run([*KERNEL_TESTS, "test_emulator.py"], environment)


@pytest.fixture(scope="module")
def runs(sanitized: dict[str, str]) -> Iterator[dict[str, Future[Done]]]:
    """All runs, begun at once, as many at a time as there are cores."""
    plain = on_emulated_kernels()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = {"sanitizers": pool.submit(run_sanitized, sanitized)}
        for schedule in emulator.SCHEDULES:
            started[schedule] = pool.submit(run, OP_TESTS, plain, "--emulated", schedule)
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("name", [*emulator.SCHEDULES, "sanitizers"])
def test_passes(runs: dict[str, Future[Done]], name: str) -> None:
    check(runs[name].result())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("global overflow", "AddressSanitizer: global-buffer-overflow"),
        ("signed overflow", "runtime error: signed integer overflow"),
    ],
)
def test_sanitizers_see_the_kernels(sanitized: dict[str, str], fault: str, report: str) -> None:
    script = f"import emulator; emulator.load().fault({fault!r})"
    environment = {**sanitized, "PYTHONPATH": str(emulator.HERE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert report in done.stderr
    assert "faults.cu" in done.stderr
