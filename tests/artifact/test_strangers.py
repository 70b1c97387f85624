"""Saved engines that fit every digest and mislead: nothing of them runs, or takes more than it may.

Each is made by a forger who has this library, and changes a file as it was saved.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastres
from fastres import artifact
from fastres.artifact.contents import Contents
from fastres.backends.segments import lower
from fastres.errors import ArtifactError, InputError
from fastres.graph import aten
from tests.artifact.test_defects import forge, put

Change = Callable[[dict[str, Any]], object]
X = torch.arange(16.0).reshape(1, 1, 4, 4)


class Rolls(nn.Module):
    """One layer of the IR, one call of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.conv(x), 1, 2)


def contents(net: nn.Module, x: Tensor = X, **options: Any) -> Contents:
    with fastres.compile(net.eval(), x, backend="reference", **options) as engine:
        return Contents(
            engine.graph, engine.source, engine.options, engine.inputs, engine.preprocess
        )


@pytest.fixture(scope="module")
def rolls() -> Contents:
    torch.manual_seed(0)
    found = contents(Rolls())
    options = found.options
    return Contents(found.graph, found.source, _named(options), found.inputs)


def _named(options: fastres.options.Options) -> fastres.options.Options:
    from dataclasses import replace

    return replace(options, backend=("reference",), device=None)


def called(overload: str, args: object = None, kwargs: object = None) -> Change:
    """Puts another operator in the place of roll, in the graph and its source."""

    def change(document: dict[str, Any]) -> None:
        for which in ("graph", "source"):
            for node in document[which]["nodes"]:
                if node["op"]["type"] == "Aten":
                    node["op"]["overload"] = overload
                    node["op"]["args"] = json.dumps([{"input": 0}] if args is None else args)
                    node["op"]["kwargs"] = json.dumps(kwargs or {})

    return change


class TestCalls:
    def test_none_are_taken_where_none_are_wanted(
        self, rolls: Contents, tiny: Callable[..., Contents], tmp_path: Path
    ) -> None:
        artifact.write(rolls, tmp_path / "rolls")
        with pytest.raises(ArtifactError, match=r"allow_aten=False refuses: roll \(aten.roll"):
            fastres.load(tmp_path / "rolls", allow_aten=False)
        artifact.write(tiny(), tmp_path / "tiny")
        assert fastres.load(tmp_path / "tiny", allow_aten=False)(X).shape == (1, 1, 4, 6)

    def test_inspect_names_them(self, rolls: Contents, tmp_path: Path) -> None:
        artifact.write(rolls, tmp_path / "rolls")
        assert "aten.roll.default" in str(fastres.load(tmp_path / "rolls").info)

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (called("aten.rand_like.default"), "it draws random numbers"),
            (called("aten.empty_like.default"), "values nobody has set"),
            (called("aten.from_file.default", ["/etc/passwd", False, 9]), "no saved engine may"),
            (called("aten.relu_.default"), "is no pure operator"),
            (called("aten.nonzero.default"), "depends on values"),
            (called("aten.add.out"), "no pure operator"),
            (called("aten.native_dropout.default", [{"input": 0}, 0.5, True]), "random"),
            (called("aten.zeros_like.default", kwargs={"memory_format": -1}), "memory_format -1"),
            (called("aten.zeros_like.default", kwargs={"dtype": 10**6}), "dtype 1000000"),
            (called("aten.relu.default", [{"input": 1}]), "no engine is saved with"),
            (called("aten.relu.default", [{"input": -1}]), "no engine is saved with"),
            (called("aten.relu.default", [{"input": True}]), "no engine is saved with"),
            (called("aten.full.default", [[1, 2, 4, 4], 1.0]), "no size of a value"),
            (called("aten.full.default", [[{"size": [0, 0, 0, 0]}], 1.0]), "no engine is saved"),
            (called("aten.relu.default", [{"input": 0}, 1]), "other arguments"),
            (called("aten.relu.default", [[[[[[{"input": 0}]]]]]]), "nested 4 deep"),
            (called("aten.add.Scalar", [{"input": 0}, 2**63]), "numbers have 64 bits"),
            (called("aten.max.default"), "claims"),
            (called("aten.to.dtype", [{"input": 0}, {"dtype": "int64"}]), "claims"),
            (called("aten.repeat.default", [{"input": 0}, [2**40, 2**40, 1, 1]]), "claims|refused"),
            (called("prims.add.default"), "not of the form aten"),
        ],
    )
    def test_that_are_refused(
        self, change: Change, why: str, rolls: Contents, tmp_path: Path
    ) -> None:
        forge(tmp_path / "forged", rolls, graph=change)
        with pytest.raises(ArtifactError, match=why):
            fastres.load(tmp_path / "forged")

    def test_what_pytorch_refuses_when_called_is_an_input_error(
        self, rolls: Contents, tmp_path: Path
    ) -> None:
        args = [{"input": 0}, 2, {"input": 0}]
        forge(tmp_path / "forged", rolls, graph=called("aten.cumsum.default", [{"input": 0}, 1]))
        assert fastres.load(tmp_path / "forged")(X).shape == (1, 2, 4, 4)
        forge(tmp_path / "forged", rolls, graph=called("aten.bitwise_and.Tensor", args[::2]))
        with pytest.raises(InputError, match="roll .* cannot compute with these values"):
            fastres.load(tmp_path / "forged")(X)

    def test_nothing_is_run_while_loading(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        split = contents(Rolls(), max_batch_size=2)
        where = tmp_path / "split"
        artifact.write(
            Contents(split.graph, split.source, _named(split.options), split.inputs), where
        )
        real, ran = aten.call, []

        def call(op: Any, inputs: Any, dtype: Any = None) -> Tensor:
            ran.extend(tensor for tensor in inputs if not tensor.is_meta)
            return real(op, inputs, dtype)

        monkeypatch.setattr(aten, "call", call)
        engine = fastres.load(where)
        assert not ran
        assert engine(X.expand(5, -1, -1, -1)).shape == (5, 2, 4, 4) and ran

    def test_whether_a_batch_may_be_split_is_asked_when_it_is(
        self, rolls: Contents, tmp_path: Path
    ) -> None:
        def change(manifest: dict[str, Any]) -> None:
            manifest["options"]["max_batch_size"] = 2

        mixing = called("aten.roll.default", [{"input": 0}, [1], [0]])
        forge(tmp_path / "static", rolls, graph=mixing, manifest=change)
        with pytest.raises(InputError, match="roll mixes the images"):  # seen without running it
            fastres.load(tmp_path / "static")
        sorts = called("aten.msort.default")  # along the batch, which no argument says
        forge(tmp_path / "mixing", rolls, graph=sorts, manifest=change)
        engine = fastres.load(tmp_path / "mixing")
        assert engine(X).shape == (1, 2, 4, 4)
        with pytest.raises(InputError, match="mixes the images of a batch"):
            engine(torch.randn(3, 1, 4, 4))

    def test_a_call_that_only_some_batch_sizes_fit(self, rolls: Contents, tmp_path: Path) -> None:
        size = {"size": [0, 0, 0, 1]}  # the batch, as PyTorch's argument
        summed = called("aten.cumsum.default", [{"input": 0}, size])

        def change(manifest: dict[str, Any]) -> None:
            manifest["options"]["max_batch_size"] = 2

        forge(tmp_path / "split", rolls, graph=summed, manifest=change)
        with pytest.raises(InputError, match="roll mixes the images"):
            fastres.load(tmp_path / "split")
        forge(tmp_path / "whole", rolls, graph=summed)
        forge(tmp_path / "fixed", rolls, graph=called("aten.cumsum.default", [{"input": 0}, 1]))
        engine, fixed = fastres.load(tmp_path / "whole"), fastres.load(tmp_path / "fixed")
        assert torch.equal(engine(X), fixed(X))
        with pytest.raises(InputError, match="Dimension out of range"):  # there are 0 to 3
            engine(X.expand(4, -1, -1, -1))
        assert engine(X[:0]).shape == (0, 2, 4, 4)


class TestMemory:
    def test_a_batch_of_millions_is_not_made_ready(
        self, tiny: Callable[..., Contents], tmp_path: Path
    ) -> None:
        def change(manifest: dict[str, Any]) -> None:
            manifest["inputs"][0]["usual"][0] = manifest["inputs"][0]["largest"][0] = 10**7

        forge(tmp_path / "forged", tiny(), manifest=change)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        engine = fastres.load(tmp_path / "forged")
        assert engine(X).shape == (1, 1, 4, 6)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB

    def test_nor_is_it_with_new_weights(
        self, tiny: Callable[..., Contents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def change(manifest: dict[str, Any]) -> None:
            manifest["inputs"][0]["usual"][0] = manifest["inputs"][0]["largest"][0] = 10**7

        prepared: list[Any] = []

        def seen(backend: Any, graph: Any, options: Any, shapes: Any, compiled: Any) -> Any:
            prepared.append(shapes)
            return lower(backend, graph, options, shapes, compiled)

        monkeypatch.setattr("fastres.assembly.assemble.lower", seen)
        forge(tmp_path / "forged", tiny(), manifest=change)
        engine = fastres.load(tmp_path / "forged")
        constants = engine.source.constants.items()
        engine.update_weights({n: torch.zeros(t.shape) for n, t in constants if t.is_meta})
        assert prepared == [((1, 1, 4, 4),)] * 2 and not engine(X).any()

    def test_values_beyond_what_a_file_may_take(
        self, tiny: Callable[..., Contents], tmp_path: Path
    ) -> None:
        def change(document: dict[str, Any]) -> None:
            for which in ("graph", "source"):
                pad, conv = document[which]["nodes"]
                pad["op"]["after"][3] = 2**30
                pad["spec"]["shape"][3] = 2**30 + 5
                conv["spec"]["shape"][3] = 2**30 + 5

        forge(tmp_path / "forged", tiny(), graph=change)
        with pytest.raises(ArtifactError, match=r"would hold .* MiB .* max_bytes="):
            fastres.load(tmp_path / "forged")

    def test_a_call_beyond_it(self, rolls: Contents, tmp_path: Path) -> None:
        """The smallest batch may take what the caller allows; a larger one grows faster."""
        artifact.write(rolls, tmp_path / "rolls")
        with pytest.raises(ArtifactError, match="max_bytes=") as found:
            fastres.load(tmp_path / "rolls", max_bytes=1)
        most = int(str(found.value).rpartition("max_bytes=")[2].rstrip(")"))
        engine = fastres.load(tmp_path / "rolls", max_bytes=most)
        assert engine(X.expand(64, -1, -1, -1)).shape == (64, 2, 4, 4)  # its own inputs count
        wide = called(
            "aten.repeat.default", [{"input": 0}, [1, {"size": [0, 0, 0, 1, 2**12]}, 1, 1]]
        )

        def change(document: dict[str, Any]) -> None:
            wide(document)
            for which in ("graph", "source"):
                node = document[which]["nodes"][-1]
                node["op"]["args"] = json.dumps(
                    [{"input": 0}, [1, 1, 1, {"size": [0, 0, -(2**20), 1, 2**20]}]]
                )
                size = {"type": "Sym", "symbol": "N", "add": -(2**22), "div": 1, "mul": 2**22}
                for spec in (node["spec"], node["op"]["result"]):
                    spec["shape"] = [spec["shape"][0], 2, 4, size]

        forge(tmp_path / "forged", rolls, graph=change)
        engine = fastres.load(tmp_path / "forged")
        assert engine(X).numel() == 0
        with pytest.raises(InputError, match=r"for inputs of \[5, 1, 4, 4\] it would hold"):
            engine(X.expand(5, -1, -1, -1))

    @pytest.mark.parametrize(
        ("given", "why"),
        [({"allow_aten": 1}, "allow_aten is 1"), ({"max_bytes": 0}, "max_bytes is 0")],
    )
    def test_wrong_arguments(self, given: Any, why: str, rolls: Contents, tmp_path: Path) -> None:
        artifact.write(rolls, tmp_path / "rolls")
        with pytest.raises(InputError, match=why):
            fastres.load(tmp_path / "rolls", **given)


class TestLaws:
    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (
                put("graph", "nodes", 0, "op", "after")([0, 0, 1, 2**31]),
                "its after is 0, 0, 1, 214",
            ),
            (put("graph", "nodes", 1, "op", "stride")([2**40, 1]), "its stride is"),
            (put("graph", "nodes", 1, "op", "dilation")([2**31, 1]), "its dilation is"),
            (put("graph", "nodes", 0, "op", "before")([0, 0, 1]), "of 4 dimensions"),
            (put("graph", "nodes", 1, "spec", "dtype")("int64"), "expected floating-point"),
            (put("graph", "nodes", 0, "spec", "dtype")("float16"), "its inputs are float32"),
        ],
    )
    def test_of_settings_and_dtypes(
        self, change: Change, why: str, tiny: Callable[..., Contents], tmp_path: Path
    ) -> None:
        forge(tmp_path / "forged", tiny(), graph=change)
        with pytest.raises(ArtifactError, match=why):
            fastres.load(tmp_path / "forged")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_of_weights(self, value: float, tiny: Callable[..., Contents], tmp_path: Path) -> None:
        weight = torch.tensor([1.0, value, 3.0]).reshape(1, 1, 3, 1)
        data = safetensors.torch.save({"weight": weight})
        forge(tmp_path / "forged", tiny(), weights=data)
        with pytest.raises(ArtifactError, match=r"weight \[1, 1, 3, 1\] holds values that are NaN"):
            fastres.load(tmp_path / "forged")

    def test_only_a_dequantize_reads_eight_bits(
        self, tiny: Callable[..., Contents], tmp_path: Path
    ) -> None:
        def change(document: dict[str, Any]) -> None:
            for which in ("graph", "source"):
                pad, conv = document[which]["nodes"]
                node = {"name": "q", "op": {"type": "Quantize", "scale": 0.5}, "inputs": ["pad"]}
                spec = {**pad["spec"], "dtype": "int8"}
                node |= {"spec": spec, "params": {}, "origin": []}
                relu = {**node, "name": "r", "op": {"type": "Activation", "kind": "relu"}}
                relu["inputs"] = ["q"]
                document[which]["nodes"] = [pad, node, relu, conv]

        forge(tmp_path / "forged", tiny(), graph=change)
        with pytest.raises(ArtifactError, match="which only a Dequantize may read"):
            fastres.load(tmp_path / "forged")
