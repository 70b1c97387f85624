"""Saved engines without PyTorch, on NumPy's arrays: `fastres.deploy.load`."""

from fastres.deploy.engine import DeployedEngine, load

__all__ = ["DeployedEngine", "load"]
