"""What this build and this process are made of."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
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


def machine() -> dict[str, Any]:
    """What a measurement belongs to.

    Returns
    -------
    dict
        ``cpu``: the processor's name; ``cores``: those this process may use; ``threads``: torch's;
        ``simd``; ``gpu``: name, or None; ``torch``, ``mtp_fast``: versions; ``date``: today.
    """
    info = build_info()
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "simd": info["simd"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": info["torch"],
        "mtp_fast": info["mtp_fast"],
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """What `machine` returned, as a line of text."""
    processor = machine["gpu"] or f"{machine['cpu']}, {machine['simd']}"
    return (
        f"{processor}, {machine['threads']} threads, torch {machine['torch']}, "
        f"mtp_fast {machine['mtp_fast']}, {machine['date']}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
