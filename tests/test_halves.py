"""The threads of csrc/common/halves.h: what they make is right, whoever is away and when."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"


@pytest.mark.skipif(not SOURCES.is_dir(), reason="an installed wheel has no sources")
@pytest.mark.parametrize(
    "flags", [[], pytest.param(["-fsanitize=thread"], marks=pytest.mark.slow)], ids=["", "tsan"]
)
def test_rounds_of_threads_that_are_often_away(tmp_path, flags):
    program = tmp_path / "halves"
    sources = [HERE / "halves.cpp", SOURCES / "common" / "parallel.cpp"]
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-pthread", *flags]
    subprocess.run([*compiler, f"-I{SOURCES}", *sources, "-ldl", "-o", program], check=True)
    done = subprocess.run([program, "1000"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
