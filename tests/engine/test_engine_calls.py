"""How an engine may be called: by name, by anything that is a tensor, and inside no tracer."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors

import fastres
from fastres.errors import FastresError, InputError


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """For every test of this file."""


class Two(nn.Module):
    """Its second input has the name of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.shift = nn.Parameter(torch.ones(1))

    def forward(self, input: Tensor, shift: Tensor) -> Tensor:
        return self.conv(input) * 2 + shift + self.shift


class Several(nn.Module):
    def forward(self, first: Tensor, /, *rest: Tensor) -> Tensor:
        return first - rest[0] * 2 + rest[1]


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.conv(pixel_values).relu()


A, B, C = torch.randn(3, 2, 3, 4, 4)
X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Pictures().eval()


@pytest.fixture(scope="module", params=["cpu", "reference"])
def engine(request: pytest.FixtureRequest, model: nn.Module) -> Iterator[fastres.Engine]:
    with fastres.compile(model, X, backend=request.param) as engine:
        yield engine


class TestNames:
    def test_by_name_in_any_order(self) -> None:
        model, shift = Two().eval(), torch.randn(2, 4, 4, 4)
        with fastres.compile(model, [A, shift], backend="reference") as engine:
            want = engine(A, shift)
            torch.testing.assert_close(want, model(A, shift).detach())
            assert torch.equal(engine(A, shift=shift), want)
            assert torch.equal(engine(shift=shift, input=A), want)
            assert engine.profile(input=A, shift=shift).rows
            assert fastres.verify(model, engine, [{"shift": shift, "input": A}]).passed
            assert fastres.verify(model, engine, {"shift": shift, "input": A}).passed
            with pytest.raises(InputError, match="'labels' is none of its inputs"):
                fastres.verify(model, engine, [{"labels": A, "shift": shift, "input": A}])
            for batches in (
                [{"shift": shift, "input": A}],
                [collections.UserDict(input=A, shift=shift)],
            ):
                assert torch.equal(next(iter(engine.map(batches))), want)

    def test_names_of_many_arguments(self) -> None:
        with fastres.compile(Several().eval(), [A, B, C], backend="reference") as engine:
            want = engine(A, B, C)
            assert torch.equal(want, A - B * 2 + C)
            assert torch.equal(engine(rest_1=C, rest_0=B, first=A), want)

    @pytest.mark.parametrize(
        ("inputs", "named", "says"),
        [
            ((), {"x": A, "shift": B}, "'x' is none of its inputs, 'input' is missing"),
            ((A,), {}, "expected 2 inputs (input, shift), got 1"),
            ((A,), {"input": A, "shift": B}, "'input' is given twice"),
            ((A, B), {"shift": B}, "'shift' is given twice"),
            ((), {"input": A}, "'shift' is missing; this engine takes input: f32[N, 3, 4, 4], shi"),
            (
                (A,),
                {"shift": 3},
                "shift: expected a torch.Tensor f32[N, 4, 4, 4], got builtins.int",
            ),
            (
                ({"input": A}, B),
                {},
                "got builtins.dict; give what it holds by name: engine(**batch)",
            ),
        ],
    )
    def test_names_that_do_not_fit(self, inputs: Any, named: Any, says: str) -> None:
        with fastres.compile(Two().eval(), [A, torch.randn(2, 4, 4, 4)], backend="reference") as e:
            with pytest.raises(InputError) as caught:
                e(*inputs, **named)
            assert says in str(caught.value)

    def test_none_is_no_input(self) -> None:
        given: dict[str, Any] = {"pixel_values": X, "labels": None}
        with fastres.compile(Pictures().eval(), given, backend="reference") as engine:
            want = engine(X)
            for found in (engine(**given), engine(X, None), engine(X, labels=None)):
                assert torch.equal(found, want)
            with pytest.raises(InputError, match="expected 1 inputs .*, got 2"):
                engine(X, X)
            with pytest.raises(InputError, match="'pixel_values' is missing"):
                engine(pixel_values=None)
            with pytest.raises(InputError, match="a fastres.Input with three shapes.* lets H and"):
                engine(torch.randn(1, 3, 9, 8))

    def test_examples_by_name(self) -> None:
        model, shift = Two().eval(), torch.randn(2, 4, 4, 4)
        with fastres.compile(model, {"shift": shift, "input": A}, backend="reference") as engine:
            assert torch.equal(engine(A, shift), engine(shift=shift, input=A))
            torch.testing.assert_close(engine(A, shift), model(A, shift).detach())
        pixels = {"pixel_values": fastres.Input((1, 3, 8, 8))}
        with fastres.compile(Pictures().eval(), pixels, backend="reference") as engine:
            assert engine(pixel_values=X).shape == (2, 4, 6, 6)

    @pytest.mark.parametrize("names", [("shift",), ("input", "bias"), ("x",)])
    def test_examples_whose_names_do_not_fit(self, names: tuple[str, ...]) -> None:
        says = "Two.forward takes input, shift: name the first of these, without a gap"
        with pytest.raises(InputError, match=says):
            fastres.compile(Two().eval(), dict.fromkeys(names, A), backend="reference")

    def test_a_saved_engine_keeps_them(self, tmp_path: Path) -> None:
        model, shift = Two().eval(), torch.randn(2, 4, 4, 4)
        with fastres.compile(model, [A, shift], backend="reference") as engine:
            want = engine(A, shift)
            engine.save(tmp_path / "engine")
        with fastres.load(tmp_path / "engine") as loaded:
            assert torch.equal(loaded(shift=shift, input=A), want)
            assert [entry.name for entry in loaded.inputs] == ["input", "shift"]

    def test_names_of_ones_own(self) -> None:
        given = [fastres.Input((2, 3, 4, 4), name=name) for name in ("left", "self", "right")]
        with fastres.compile(Several().eval(), given, backend="reference") as engine:
            assert torch.equal(engine(A, right=C, self=B), A - B * 2 + C)
        with pytest.raises(InputError, match="two inputs have one name"):
            fastres.compile(Several().eval(), [given[0]] * 3, backend="reference")

    @pytest.mark.parametrize("by_name", [False, True])
    def test_an_exported_program(self, by_name: bool) -> None:
        """Also one exported by name, as Hugging Face models are called."""
        model, free = Pictures().eval(), {0: torch.export.Dim.AUTO}
        args, named = ((), {"pixel_values": X}) if by_name else ((X,), None)
        shapes = {"pixel_values": free}
        program = torch.export.export(model, args, named, dynamic_shapes=shapes)
        with fastres.compile(program, backend="reference") as engine:
            torch.testing.assert_close(engine(pixel_values=X), model(X).detach())
            assert torch.equal(engine(X), engine(pixel_values=X))

    def test_decoded_pictures(self) -> None:
        pictures = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
        with fastres.compile(
            Pictures().eval(),
            X,
            preprocess=fastres.Preprocess(),
            io_dtype=torch.uint8,
            backend="reference",
        ) as engine:
            assert torch.equal(engine(pixel_values=pictures), engine(pictures))


class Inside(nn.Module):
    def __init__(self, engine: fastres.Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        return self.engine(x) * 2


def faked(engine: fastres.Engine) -> object:
    with FakeTensorMode() as mode:
        return engine(mode.from_tensor(X))


def faked_outside(engine: fastres.Engine) -> object:
    return engine(FakeTensorMode().from_tensor(X))


def real_among_fakes(engine: fastres.Engine) -> object:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return engine(X)


TRACERS: dict[str, tuple[Callable[[fastres.Engine], object], str]] = {
    "jit.trace": (lambda e: torch.jit.trace(e, X), "torch.jit.trace"),
    "jit.trace of a model": (lambda e: torch.jit.trace(Inside(e), X), "torch.jit.trace"),
    "jit.trace of a function": (lambda e: torch.jit.trace(lambda x: e(x), X), "torch.jit.trace"),
    "jit.script": (torch.jit.script, "torch.jit.script"),
    "export": (lambda e: torch.export.export(Inside(e), (X,)), "torch.export"),
    "export by name": (
        lambda e: torch.export.export(Inside(e), (), {"x": X}),
        "torch.export",
    ),
    "vmap": (lambda e: torch.vmap(e)(X[:, None]), "such as vmap or grad"),
    "vmap of another batch": (lambda e: torch.vmap(e, in_dims=1)(X[:, None]), "such as vmap"),
    "vmap by name": (
        lambda e: torch.vmap(lambda x: e(pixel_values=x))(X[:, None]),
        "such as vmap or grad",
    ),
    "grad": (lambda e: torch.func.grad(lambda x: e(x).sum())(X), "such as vmap or grad"),
    "jvp": (lambda e: torch.func.jvp(e, (X,), (X,)), "such as vmap or grad"),
    "vjp": (lambda e: torch.func.vjp(e, X), "such as vmap or grad"),
    "jacrev": (lambda e: torch.func.jacrev(e)(X[:1]), "such as vmap or grad"),
    "functionalize": (lambda e: torch.func.functionalize(e)(X), "such as vmap or grad"),
    "make_fx": (lambda e: make_fx(e)(X), "ProxyTorchDispatchMode"),
    "make_fx with fakes": (lambda e: make_fx(e, tracing_mode="symbolic")(X), "FakeTensorMode"),
    "FakeTensorMode": (faked, "FakeTensorMode"),
    "a FakeTensor": (faked_outside, "its tensor is a FakeTensor"),
    "FakeTensorMode, a real tensor": (real_among_fakes, "FakeTensorMode"),
    "fx": (lambda e: torch.fx.symbolic_trace(Inside(e)), "torch.fx.symbolic_trace"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", TRACERS)
def test_refuses_to_be_recorded(engine: fastres.Engine, name: str) -> None:
    record, tracer = TRACERS[name]
    want = engine(X)
    with pytest.raises(InputError) as caught:
        record(engine)
    said = str(caught.value)
    assert said.startswith("this engine was called inside ") and tracer in said
    assert "\n" not in said and "give the model itself" in said
    assert torch.equal(engine(X), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
class TestCompiler:
    def test_runs_between_two_graphs(self, engine: fastres.Engine) -> None:
        torch._dynamo.reset()
        graphs = []

        def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
            graphs.append([n.name for n in graph.graph.nodes if n.op == "call_function"])
            return graph

        model = torch.compile(lambda x: engine(x + 1) * 2, backend=backend)
        for batch in (X, X[:1], X):
            assert torch.equal(model(batch), engine(batch + 1) * 2)
        assert ["add"] in graphs and ["mul"] in graphs
        assert all(names in (["add"], ["mul"]) for names in graphs), graphs  # nothing of the engine

    def test_by_name_and_compiled_itself(self, engine: fastres.Engine) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(engine, backend="eager")
        assert torch.equal(compiled(pixel_values=X), engine(X))

    def test_where_there_may_be_one_graph_only(self, engine: fastres.Engine) -> None:
        torch._dynamo.reset()
        whole = torch.compile(Inside(engine), backend="eager", fullgraph=True)
        message = "a fastres engine runs outside of PyTorch's graphs"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            whole(X)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            torch.export.export(Inside(engine), (X,), strict=True)


def threads_of_others(engine: fastres.Engine) -> Iterator[Any]:
    """Each tracer in this thread, while another thread calls the engine."""
    with ThreadPoolExecutor(1) as pool:
        want = engine(X)

        def meanwhile(x: Tensor) -> Tensor:
            # not to the bit: PyTorch switches oneDNN off for all threads while one exports
            assert pool.submit(lambda: torch.allclose(engine(X), want, atol=1e-5)).result()
            return x * 2

        class Model(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return meanwhile(x)

        yield torch.export.export(Model(), (X,))
        yield torch.jit.trace(Model(), X, check_trace=False)
        yield torch.vmap(meanwhile)(X)
        yield torch.func.grad(lambda x: meanwhile(x).sum())(X)
        yield make_fx(meanwhile)(X)
        with FakeTensorMode() as mode:
            yield meanwhile(mode.from_tensor(X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_other_threads_record_is_theirs(engine: fastres.Engine) -> None:
    assert len(list(threads_of_others(engine))) == 6


class Plain(Tensor):
    """A subclass that is there for its name only."""


class Doubling(Tensor):
    """A subclass that changes what operations mean."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class TestTensors:
    @pytest.mark.parametrize(
        "make",
        [
            lambda x: x.clone().requires_grad_(),
            nn.Parameter,
            nn.Buffer,
            lambda x: x.as_subclass(Plain),
            tv_tensors.Image,
            lambda x: tv_tensors.Image(-x)._neg_view(),
        ],
        ids=["requires_grad", "Parameter", "Buffer", "subclass", "tv_tensors", "negative"],
    )
    def test_tensors_that_are_taken(self, engine: fastres.Engine, make: Callable[..., Any]) -> None:
        found = engine(make(X))
        assert type(found) is Tensor and torch.equal(found, engine(X))
        assert not found.requires_grad

    def test_a_subclass_with_rules_of_its_own(self, engine: fastres.Engine) -> None:
        with pytest.raises(InputError, match=r"Doubling, a tensor .* give a plain torch.Tensor"):
            engine(X.as_subclass(Doubling))

    @pytest.mark.parametrize(
        "around",
        [
            torch.inference_mode,
            torch.no_grad,
            torch.enable_grad,
            lambda: torch.autocast("cpu", torch.bfloat16),
            lambda: torch.device("meta"),
            lambda: FlopCounterMode(display=False),
            forward_ad.dual_level,
        ],
        ids=["inference", "no_grad", "enable_grad", "autocast", "device", "flops", "dual"],
    )
    def test_modes_that_change_nothing(
        self, engine: fastres.Engine, around: Callable[[], Any]
    ) -> None:
        want = engine(X)
        with around():
            assert torch.equal(engine(X), want)
            made = torch.empty(2, 3, 8, 8, device="cpu").copy_(X)
            assert torch.equal(engine(made), want)
        assert torch.equal(engine(made), want)  # made in inference mode, for one

    def test_a_closed_engine_says_so_first(self, model: nn.Module) -> None:
        engine = fastres.compile(model, X, backend="reference")
        engine.close()
        with pytest.raises(FastresError, match="closed"):
            engine(pixel_values=X)


@pytest.mark.parametrize("batch", [1, 3])
def test_examples_of_two_batch_sizes(batch: int) -> None:
    shift = fastres.Input((batch, 4, 4, 4))
    with pytest.raises(InputError, match=rf"shift is \[{batch}, 4, 4, 4\], with {batch} where inp"):
        fastres.compile(Two().eval(), [A, shift], backend="reference")
