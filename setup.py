"""Finds the packages, three of whose trees lie side by side, and builds the kernels of the CPU.

All else is in pyproject.toml.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HOMES = {"fastres": "fastres", "fastres.kernels": "kernels", "fastres.calib": "calib"}
LIBRARY = "libfastres_cpu.so"
# what each file is compiled for; which of them runs is found out by the library
INSTRUCTIONS = {
    "library.cpp": [],
    "avx2.cpp": ["-mavx2", "-mfma"],
    "avx512.cpp": [f"-mavx512{part}" for part in ("f", "dq", "bw", "vl")]
    + ["-mavx2", "-mfma", "-mprefer-vector-width=512"],
}
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"]


def threads() -> tuple[list[str], list[str]]:
    """Where oneTBB's headers and its library lie, if the package tbb-devel has brought them."""
    try:
        found = [Path(str(file.locate())).resolve() for file in files("tbb-devel") or ()]
    except PackageNotFoundError:
        return [], []
    known = ("include", "tbb", "parallel_for.h")
    headers = [str(path.parents[1]) for path in found if path.parts[-3:] == known]
    return headers, [str(Path(folder).parent / "lib") for folder in headers]


class BuildLibrary(build_ext):
    """A library of C functions, which is no module of Python: one for every version of it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_name(LIBRARY))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        headers, libraries = threads()
        compiled = []
        for name in ext.sources:
            own = [*FLAGS, *INSTRUCTIONS[Path(name).name]]
            compiled += self.compiler.compile(
                [name],
                self.build_temp,
                include_dirs=headers,
                extra_postargs=own,
                depends=ext.depends,
            )
        self.compiler.link_shared_object(
            compiled,
            self.get_ext_fullpath(ext.name),
            libraries=["tbb"],
            library_dirs=libraries,
            target_lang="c++",
        )


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def kernels() -> list[Extension]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    folder = Path("kernels", "cpu")
    sources = [str(folder / name) for name in INSTRUCTIONS]
    headers = sorted(map(str, folder.glob("*.h")))
    # optional: without a compiler all else is installed
    return [Extension("fastres.kernels.cpu.compiled", sources, depends=headers, optional=True)]


commands: dict[str, Any] = {"build_ext": BuildLibrary, "bdist_wheel": Wheel}
setup(
    packages=[
        package
        for name, folder in HOMES.items()
        for package in (name, *(f"{name}.{inner}" for inner in find_packages(folder)))
    ],
    package_dir=HOMES,
    package_data={"fastres": ["py.typed"], "fastres.report": ["page.*"]}
    | {"fastres.backends.triton.planning.tables": ["*.json"]},
    exclude_package_data={"fastres.kernels.cpu": ["*.cpp", "*.h"]},
    ext_modules=kernels(),
    cmdclass=commands,
)
