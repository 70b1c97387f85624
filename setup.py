"""Finds the packages, three of whose trees lie side by side; all else is in pyproject.toml."""

from setuptools import find_packages, setup

HOMES = {"fastres": "fastres", "fastres.kernels": "kernels", "fastres.calib": "calib"}

setup(
    packages=[
        package
        for name, folder in HOMES.items()
        for package in (name, *(f"{name}.{inner}" for inner in find_packages(folder)))
    ],
    package_dir=HOMES,
    package_data={"fastres": ["py.typed"], "fastres.report": ["page.*"]}
    | {"fastres.backends.triton.planning.tables": ["*.json"]},
)
