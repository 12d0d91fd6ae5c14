"""Build of the compiled core with CMake and ninja; everything else about the package is in pyproject.toml.

Environment:
    TULU_HPC_CUDA   AUTO (default: CUDA kernels when nvcc is found), ON (an error without nvcc) or OFF
    CMAKE_ARGS      further arguments for cmake
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "libtulu_core.so"


class BuildCore(build_ext):
    """Runs cmake and ninja; the libraries land beside the Python files of tulu_hpc.kernels."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cuda = os.environ.get("TULU_HPC_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"TULU_HPC_CUDA is {cuda!r}; it must be AUTO, ON or OFF")
        missing = [program for program in ("cmake", "ninja", os.environ.get("CXX", "c++")) if not shutil.which(program)]
        if missing:
            raise SystemExit(
                f"building tulu_hpc.kernels needs {', '.join(missing)}: install a C++ compiler, cmake and ninja"
            )
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Kept between builds, so that a second install only links again; one directory per toolchain, because a cmake
        # cache remembers programs that may be gone.
        toolchain = [cuda, sys.executable, shutil.which("nvcc"), *map(os.environ.get, ("CXX", "CUDACXX", "CMAKE_ARGS"))]
        key = hashlib.sha256(repr(toolchain).encode()).hexdigest()[:8]
        build = ROOT / "build" / f"core-{sys.implementation.cache_tag}-{key}"
        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTULU_CUDA={cuda}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command).returncode:
                raise SystemExit(f"building tulu_hpc.kernels failed in: {shlex.join(command)} (its output is above)")

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            target = Path(self.get_ext_fullpath(ext.name))
            for source, name in ((built.parent / LIBRARY, LIBRARY), (built, target.name)):
                # Replaced, not overwritten: a process that has the old library mapped would crash.
                shutil.copy2(source, target.with_name(f"{name}.new"))
                os.replace(target.with_name(f"{name}.new"), target.with_name(name))

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        return outputs + [str(Path(path).parent / LIBRARY) for path in outputs]


class BuildPython(build_py):
    """Adds configs/ to an installed package as tulu_hpc/configs."""

    def run(self) -> None:
        if not self.editable_mode:  # files of an earlier build that no longer exist must not get into the wheel
            shutil.rmtree(Path(self.build_lib) / "tulu_hpc", ignore_errors=True)
        super().run()
        if not self.editable_mode and (ROOT / "configs").is_dir():
            shutil.copytree(ROOT / "configs", Path(self.build_lib) / "tulu_hpc" / "configs", dirs_exist_ok=True)


setup(
    # tulu_hpc/kernels is a link to kernels/: the search follows it, so a wheel holds the real files.
    packages=find_packages(include=["tulu_hpc", "tulu_hpc.*"]),
    package_data={"": ["*.j2", "*.jinja", "*.json", "*.yaml", "*.yml", "*.txt", "*.html", "*.css", "*.js", "py.typed"]},
    ext_modules=[Extension("tulu_hpc.kernels._core", sources=[])],
    cmdclass={"build_ext": BuildCore, "build_py": BuildPython},
)
