"""The kernel tests on the emulator, clean under AddressSanitizer and UndefinedBehaviorSanitizer."""

import subprocess
import sys

import pytest

import emulator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not emulator.AVAILABLE, reason="needs the sources and x86-64"),
]

TESTS = (
    "tests/test_cuda_acceptance.py",
    "tests/test_cuda_cross_entropy.py",
    "tests/test_emulator.py",
)


def test_kernels_are_clean():
    # A process of its own: the sanitizers must be there from the start.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda"]
    done = subprocess.run(
        [*command, *TESTS],
        cwd=emulator.ROOT,
        env=emulator.sanitizer_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
