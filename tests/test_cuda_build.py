"""nvcc compiles every kernel for every architecture without a warning, a spill or a stack frame."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
KERNELS = sorted(path.parent.name for path in CSRC.glob("*/cuda.cu"))
ARCHITECTURES = ("80", "90a", "100", "120")

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
needs_nvcc = pytest.mark.skipif(shutil.which(NVCC) is None, reason="needs nvcc")
TOOLS = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
SEARCH = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(op, architecture) -> the cubin and what nvcc and ptxas said."""
    done: dict[tuple[str, str], tuple[Path, str]] = {}

    def compile_(op: str, architecture: str) -> tuple[Path, str]:
        if (op, architecture) not in done:
            cubin = tmp_path_factory.mktemp("cubin") / f"{op}_{architecture}.cubin"
            command = [NVCC, "-std=c++17", "-O3", f"-I{CSRC}", f"-arch=sm_{architecture}"]
            command += ["-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-cubin"]
            command += ["-o", str(cubin), str(CSRC / op / "cuda.cu")]
            result = subprocess.run(command, capture_output=True, text=True)
            if "Unsupported gpu architecture" in result.stderr:
                pytest.skip(f"this nvcc does not know sm_{architecture}")
            assert result.returncode == 0, result.stderr
            done[op, architecture] = cubin, result.stderr
        return done[op, architecture]

    return compile_


@needs_nvcc
@pytest.mark.parametrize(
    "architecture",
    [a if a == "90a" else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES],
)
@pytest.mark.parametrize("op", KERNELS)
def test_no_warning_no_spill_no_stack_frame(compiled, op, architecture):
    _, report = compiled(op, architecture)
    assert "warning" not in report
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    assert len(frames) == len(re.findall(r"Compiling entry function", report)) > 0
    assert set(frames) == {("0", "0", "0")}


@needs_nvcc
@pytest.mark.skipif(
    shutil.which("cuobjdump", path=SEARCH) is None or shutil.which("nvdisasm", path=SEARCH) is None,
    reason="needs cuobjdump and nvdisasm",
)
def test_rows_move_in_128_bits(compiled):
    """Each instantiation of the cross-entropy kernels loads and stores 16 bytes at a time."""
    cubin, _ = compiled("cross_entropy", "90a")
    listing = subprocess.run(
        ["cuobjdump", "-sass", str(cubin)],
        env={**os.environ, "PATH": SEARCH},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions = listing.split("Function :")[1:]
    assert len(functions) == 24
    for function in functions:
        instructions = [r"LDG\S*\.128", r"STG\S*\.128"]
        if "gradient_kernel" not in function.split()[0]:  # that one has no shared memory
            instructions += [r"LDS\S*\.128", r"STS\S*\.128"]
        for instruction in instructions:
            assert re.search(instruction, function), instruction
        assert not re.search(r"\b(LDL|STL)\b", function)  # no local memory
