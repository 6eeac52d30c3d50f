"""The CUDA kernels on the CPU: builds the emulated extension module and turns its switches.

`load()` gives the module (same functions as ``mtp_fast._C`` of a CUDA build) together with what
tests set and read: the device, the schedule, disabled barriers, the bytes moved.
"""

import ctypes
import functools
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

SCHEDULES = ("forward", "reverse", "shuffled")
# Not where the tests are run against an installed wheel, without the sources.
AVAILABLE = platform.machine() == "x86_64" and (ROOT / "csrc").is_dir()


class Counters(ctypes.Structure):
    """Since the last `Emulator.measure`: sums of bytes; the rest is of the last launch."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "launches",
            "read",
            "written",
            "blocks",
            "threads",
            "cluster",
            "shared_bytes",
            "device",
        )
    ]


class Barrier(NamedTuple):
    """One use of a barrier by a kernel: the line, and the how-manieth time a thread is there."""

    site: int
    visit: int
    name: str


class Emulator:
    """An emulated extension module, `C`, and the emulator inside it."""

    def __init__(self, library: Path) -> None:
        spec = importlib.util.spec_from_file_location(f"emulated_{library.parent.name}._C", library)
        assert spec is not None
        assert spec.loader is not None
        self.C: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.C)
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_barrier.restype = ctypes.c_char_p
        self._library.emulator_counters.restype = ctypes.POINTER(Counters)
        self._library.emulator_fault.restype = ctypes.c_char_p
        self._library.emulator_launch.restype = ctypes.c_char_p
        self._library.emulator_launch.argtypes = [
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_bool,
        ]
        self._library.emulator_first_global.restype = ctypes.c_float

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the ops run on CPU tensors what they run on CUDA tensors."""

        def call_kernel(name: str, like: object, *arguments: object) -> object:
            return getattr(self.C, f"{name}_cuda")(0, 0, *arguments)

        monkeypatch.setattr("mtp_fast.ops._common.call_kernel", call_kernel)
        monkeypatch.setattr("mtp_fast.ops._common.on_cuda", lambda tensor: True)

    def set_device(self, capability: int) -> None:
        """Emulate an sm_80, sm_90, sm_100 or sm_120 device."""
        if not self._library.emulator_set_device(capability):
            raise ValueError(f"capability: expected 80, 90, 100 or 120, got {capability}")

    def set_schedule(self, schedule: str, seed: int = 0) -> None:
        self._library.emulator_set_schedule(SCHEDULES.index(schedule), seed)

    def measure(self) -> Counters:
        """Start counting from zero; the result is kept up to date."""
        self._library.emulator_reset_counters()
        counters: Counters = self._library.emulator_counters().contents
        return counters

    def last_error(self) -> int:
        """What cudaGetLastError returns."""
        return int(self._library.emulator_last_error())

    def fault(self, name: str) -> str:
        """Run the kernel of faults.cu with this fault; return the report, "" for none."""
        return str(self._library.emulator_fault(name.encode()).decode())

    def launch(
        self, blocks: int, threads: int, shared_bytes: int, cluster: int, cooperative: bool = False
    ) -> str:
        """Launch a kernel that does nothing; return the error, "" for none."""
        shape = (blocks, threads, shared_bytes, cluster, cooperative)
        return str(self._library.emulator_launch(*shape).decode())

    def first_global(self) -> float:
        """What the kernel of faults.cu left in global memory."""
        return float(self._library.emulator_first_global())

    def forget_barriers(self) -> None:
        self._library.emulator_reset_barriers()

    def barriers(self) -> list[Barrier]:
        """All uses of barriers since `forget_barriers`."""
        found, visits = [], ctypes.c_int()
        site = 0
        while name := self._library.emulator_barrier(site, ctypes.byref(visits)):
            found += [Barrier(site, visit, name.decode()) for visit in range(visits.value)]
            site += 1
        return found

    @contextmanager
    def without(self, barrier: Barrier) -> Iterator[None]:
        self._library.emulator_disable_barrier(barrier.site, barrier.visit)
        try:
            yield
        finally:
            self._library.emulator_disable_barrier(-1, -1)


def build(name: str, *, sanitize: bool = False, csrc: Path = ROOT / "csrc") -> Path:
    """Compile the kernels in `csrc` into build/emulator/`name`; return the module's path."""
    import pybind11

    folder = ROOT / "build" / "emulator" / name
    options = {
        "CMAKE_BUILD_TYPE": "None",
        "MTP_SANITIZE": "ON" if sanitize else "OFF",
        "MTP_CSRC": csrc,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = ["cmake", "-S", str(HERE), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-D{option}={value}" for option, value in options.items()]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the emulator does not build:\n{done.stdout}{done.stderr}")
    (library,) = folder.glob("_C.*.so")
    return library


@functools.cache
def load() -> Emulator:
    """The emulated module of this session.

    MTP_EMULATOR_SANITIZE=1 asks for the sanitizers, which must be in the process from its start:
    see `sanitizer_environment`. MTP_EMULATOR_LIBRARY is the path of a module that is built already.
    """
    if library := os.environ.get("MTP_EMULATOR_LIBRARY"):
        return Emulator(Path(library))
    if os.environ.get("MTP_EMULATOR_SANITIZE") == "1":
        return Emulator(build("sanitized", sanitize=True))
    return Emulator(build("plain"))


def sanitizer_environment() -> dict[str, str]:
    """The environment of a process in which `load` gives the sanitized module."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "MTP_EMULATOR_SANITIZE": "1",
        "LD_PRELOAD": ":".join(libraries),
        # Python and torch leak by design. To see uses after a return, which some versions do unless
        # told not to, gives each thread of a kernel a second stack: ten times as slow.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
