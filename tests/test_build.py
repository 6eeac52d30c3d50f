"""The compiled module: what it links, what it says about itself, what its import costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtp_fast
from mtp_fast import _C


def _python(code: str, cwd: Path, **env: str) -> str:
    """Run code in a fresh interpreter, outside the source tree."""
    return subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | env,
    ).stdout.strip()


def test_module_links_no_torch_cuda_or_python() -> None:
    ldd = subprocess.run(["ldd", _C.__file__], check=True, capture_output=True, text=True).stdout
    linked = " ".join(line.split()[0] for line in ldd.splitlines())  # without paths and addresses
    assert "libc.so" in linked
    for name in ("torch", "c10", "cuda", "cudart", "nvrtc", "python", "gomp", "iomp"):
        assert name not in linked


def test_build_info() -> None:
    info = mtp_fast.build_info()
    assert info["torch"] == torch.__version__
    assert info["simd"] == info["simd_levels"][-1]
    assert info["simd_levels"][0] == "portable"
    assert info["backends"][0] == "cpu"
    assert ("cuda" in info["backends"]) == bool(info["cuda"]) == bool(info["cuda_architectures"])


def test_kernels_run_on_torch_s_own_threads() -> None:
    """A second OpenMP runtime would spin beside torch's and slow both."""
    source = Path(mtp_fast.build_info()["threads_from"])
    mapped = Path("/proc/self/maps").read_text()
    assert str(source) in mapped
    assert "torch" in source.parts


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_simd_level_from_the_environment(level: str, tmp_path: Path) -> None:
    if level not in mtp_fast.build_info()["simd_levels"]:
        pytest.skip(f"this processor has no {level}")
    code = "import mtp_fast; print(mtp_fast.build_info()['simd'])"
    assert _python(code, tmp_path, MTP_FAST_SIMD=level) == level


def test_a_simd_level_beyond_the_processor_is_lowered(tmp_path: Path) -> None:
    code = "import mtp_fast; print(mtp_fast.build_info()['simd'])"
    best = mtp_fast.build_info()["simd_levels"][-1]
    assert _python(code, tmp_path, MTP_FAST_SIMD="amx") == best


def test_a_simd_level_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        _python("import mtp_fast", tmp_path, MTP_FAST_SIMD="AVX2")
    assert "MTP_FAST_SIMD: expected one of portable, avx2" in failed.value.stderr
    assert 'got "AVX2"' in failed.value.stderr


def test_import_is_cheap(tmp_path: Path) -> None:
    """Under 100 ms beside torch: processor time, the best of five, since machines are noisy."""
    code = """
import time, torch
start = time.process_time(); import mtp_fast; print(time.process_time() - start)
"""
    assert min(float(_python(code, tmp_path)) for _ in range(5)) < 0.1


def test_public_names_have_docstrings() -> None:
    for name in mtp_fast.__all__:
        if name != "__version__":
            assert getattr(mtp_fast, name).__doc__, name
