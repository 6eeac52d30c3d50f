"""What this build and this process are made of."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from mtp_fast import _C

__version__ = version("mtp-fast")


def build_info() -> dict[str, Any]:
    """Versions, backends and instruction sets, for bug reports and `mtp-fast --version`.

    Returns
    -------
    dict
        ``mtp_fast``, ``python``, ``torch``: versions; ``compiler``, ``pybind11``: what built the
        module; ``backends``: "cpu" and, if the module holds CUDA kernels, "cuda"; ``cuda``: the
        toolkit's version or None; ``cuda_architectures``: what they were compiled for; ``simd``:
        the level in use, of ``simd_levels``; ``threads_from``: whose threads CPU kernels run on.
    """
    compiled = _C.build_info()
    return {
        "mtp_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": compiled["compiler"],
        "pybind11": compiled["pybind11"],
        "backends": ["cpu", "cuda"] if compiled["cuda"] else ["cpu"],
        "cuda": compiled["cuda"] or None,
        "cuda_architectures": compiled["cuda_architectures"].split(),
        "simd": compiled["simd"],
        "simd_levels": compiled["simd_levels"],
        "threads_from": compiled["threads_from"],
    }
