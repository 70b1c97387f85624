"""What an engine returns is what the model returns, here and where its file is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.errors import ArtifactError

X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """For every test of this file."""


class Pair(NamedTuple):
    logits: Tensor
    features: tuple[Tensor, ...]


class TestOutputs:
    def test_a_namedtuple_that_pytorch_has_no_name_for(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Pair:
                return Pair(x * 2, (x + 1,))

        model = Net().eval()
        with fastres.compile(model, X, backend="reference") as engine:
            found = engine(X)
            assert type(found) is Pair and torch.equal(found.logits, X * 2)
            assert fastres.verify(model, engine, [X]).passed
            engine.save(tmp_path / "engine")
        with fastres.load(tmp_path / "engine") as loaded:
            found = loaded(X)
            assert type(found) is dict and torch.equal(found["features"][0], X + 1)
            assert "test_engine_outputs.Pair, this engine a dict" in str(loaded.info)

    def test_none_beside_tensors(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return {"aux": None, "out": (x * 2, None, [x + 1, None])}

        model = Net().eval()
        with fastres.compile(model, X, backend="reference") as engine:
            engine.save(tmp_path / "engine")
            report = fastres.verify(model, engine, [X])
            assert report.passed and len(report.outputs) == 2
            with fastres.load(tmp_path / "engine") as loaded:
                for made in (engine, loaded):
                    for x in (X, X[:0]):
                        found = made(x)
                        assert list(found) == ["aux", "out"] and found["aux"] is None
                        twice, nothing, (more, none) = found["out"]
                        assert torch.equal(twice, x * 2) and torch.equal(more, x + 1)
                        assert nothing is none is None

    def test_what_cannot_be_saved_runs_here(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> dict[Any, Tensor]:
                return {(1, 2): x * 2}

        with fastres.compile(Net().eval(), X, backend="reference") as engine:
            assert torch.equal(engine(X)[1, 2], X * 2)
            with pytest.raises(ArtifactError, match=r"cannot be saved: .* keys \[\(1, 2\)\]; only"):
                engine.save(tmp_path / "engine")

    def test_a_package_that_is_not_there(self, tmp_path: Path) -> None:
        """As transformers' outputs are: a dict of what is set, registered by the class."""
        package = tmp_path / "package"
        package.mkdir()
        (package / "modelling.py").write_text("""
import collections, torch
import torch.utils._pytree as pytree

class Output(collections.OrderedDict):
    def __init__(self, logits=None, hidden_states=None):
        fields = {"logits": logits, "hidden_states": hidden_states}
        super().__init__({key: value for key, value in fields.items() if value is not None})
        self.__dict__.update(fields)

pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Output(**dict(zip(keys, values))),
    serialized_type_name="modelling.Output",
    flatten_with_keys_fn=lambda o: ([(pytree.MappingKey(k), v) for k, v in o.items()], list(o)),
)

class Net(torch.nn.Module):
    def forward(self, pixel_values):
        return Output(pixel_values * 2, (pixel_values, Output(pixel_values + 1)))
""")
        make = """
import fastres, modelling, torch
engine = fastres.compile(modelling.Net().eval(), torch.ones(2, 3), backend="reference")
engine.save("engine")
for made in (engine, fastres.load("engine")):
    y = made(torch.ones(2, 3))
    assert type(y) is type(y.hidden_states[1]) is modelling.Output, y
    assert not made.info.account.notes
"""
        use = """
import sys, fastres, torch
engine = fastres.load("engine")
y = engine(pixel_values=torch.ones(1, 3))
print(type(y).__name__, type(y["hidden_states"][1]).__name__, list(y), float(y["logits"].sum()))
print(*engine.info.account.notes)
assert "modelling" not in sys.modules
"""
        # each imports from the folder that it stands in, and saves where it runs
        (package / "make.py").write_text(make)
        (tmp_path / "use.py").write_text(use)
        for script in (package / "make.py", tmp_path / "use.py"):
            done = subprocess.run(
                [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        types, notes = done.stdout.splitlines()
        assert types == "dict dict ['logits', 'hidden_states'] 6.0"
        assert "the model returns modelling.Output, this engine a dict" in notes
        assert "import what does that (modelling) first" in notes
