"""Builds mtp_fast._C with CMake, Ninja and pybind11; everything else is in pyproject.toml.

Environment: MTP_FAST_CUDA=0 (CPU only) or 1 (nvcc required); MTP_FAST_CUDA_ARCHS (CMake's names,
semicolons between them); CMAKE_ARGS (passed on); MAX_JOBS (parallel compilations).
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja")
        if ninja is None:
            raise RuntimeError("ninja is missing: pip install ninja")
        options = {
            # Anew every time: an isolated build's own ninja is gone when the next build begins.
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "MTP_FAST_CUDA": os.environ.get("MTP_FAST_CUDA", "AUTO"),
            "MTP_FAST_CUDA_ARCHS": os.environ.get("MTP_FAST_CUDA_ARCHS", ""),
        }
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        compile_ = ["cmake", "--build", str(build), "--target", "_C"]
        if jobs := os.environ.get("MAX_JOBS"):
            compile_ += ["--parallel", jobs]
        subprocess.run(configure, check=True)
        subprocess.run(compile_, check=True)


setup(ext_modules=[Extension("mtp_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
