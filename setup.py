"""Maps the top-level folders to their packages; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "fastres",
        "fastres.graph",
        "fastres.graph.passes",
        "fastres.backends",
        "fastres.backends.triton",
        "fastres.backends.tensorrt",
        "fastres.report",
        "fastres.cli",
        "fastres.timing",
        "fastres.calib",
        "fastres.kernels",
    ],
    package_dir={"fastres.kernels": "kernels", "fastres.calib": "calib"},
    package_data={"fastres": ["py.typed", "backends/triton/tables/*.json", "report/page.*"]},
)
