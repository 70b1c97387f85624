"""fastres.graph.shapes: every shape rule says what PyTorch does, with numbers and with symbols."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastres.backends.reference import evaluate
from fastres.errors import GraphError
from fastres.graph.ir import (
    Activation,
    Add,
    Aten,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Mul,
    Node,
    Normalize,
    Op,
    Pad,
    Slice,
    Softmax,
    Value,
)
from fastres.graph.shapes import bind, conv_size, infer_shapes, node_shape, pool_size
from fastres.graph.specs import Dim, Shape, Sym, TensorSpec
from fastres.kernels.epilogue import Epilogue

N, H, W = Sym("N"), Sym("H"), Sym("W")
SIZES = {"N": 2, "H": 13, "W": 10}


def rule(op: Op, inputs: list[Shape], params: dict[str, tuple[int, ...]] | None = None) -> Shape:
    """The shape rule of one operation, read through a graph of that node alone."""
    names = tuple(f"x{i}" for i in range(len(inputs)))
    constants = {slot: torch.zeros(shape) for slot, shape in (params or {}).items()}
    node = Node("y", op, names, TensorSpec(()), {slot: slot for slot in constants})
    values = tuple(Value(n, TensorSpec(s)) for n, s in zip(names, inputs, strict=True))
    graph = Graph(values, (node,), ("y",), constants, "")
    return node_shape(graph, node, dict(zip(names, inputs, strict=True)))


# (x + n) or x // n, any number of times; and before them x * n, any number of times
steps = st.lists(
    st.one_of(
        st.tuples(st.just("plus"), st.integers(-40, 40)),
        st.tuples(st.just("floordiv"), st.integers(1, 7)),
    ),
    max_size=8,
)
factors = st.lists(st.integers(1, 12), max_size=2)


def multiple(numbers: list[int]) -> Sym:
    """H times these numbers."""
    size: Sym | None = H
    for n in numbers:
        assert size is not None
        size = size.times(n)
    assert size is not None
    return size


class TestSym:
    @given(factors, steps, st.integers(-50, 5000))
    def test_a_chain_is_one_form(
        self, first: list[int], chain: list[tuple[str, int]], value: int
    ) -> None:
        size, want = multiple(first), value * math.prod(first)
        for name, n in chain:
            size = getattr(size, name)(n)
            want = want + n if name == "plus" else want // n
        assert size.at(value) == want

    @given(factors, steps, factors, steps)
    def test_equal_forms_are_equal_sizes(
        self, i: list[int], a: list[tuple[str, int]], j: list[int], b: list[tuple[str, int]]
    ) -> None:
        left, right = multiple(i), multiple(j)
        for name, n in a:
            left = getattr(left, name)(n)
        for name, n in b:
            right = getattr(right, name)(n)
        # two periods of both: forms that agree there agree everywhere
        values = range(2 * max(left.div, right.div) + 1)
        grow_alike = left.mul * right.div == right.mul * left.div
        same = all(left.at(v) == right.at(v) for v in values) and grow_alike
        assert (left == right) == same

    @given(st.integers(-9, 9), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
    def test_its_text_is_its_meaning(self, add: int, div: int, mul: int, value: int) -> None:
        size = Sym("H", add, div, mul)
        assert eval(str(size), {"H": value}) == size.at(value)

    def test_text(self) -> None:
        forms = (Sym("N"), Sym("H", 1), Sym("H", -1, 2), Sym("W", 0, 4), Sym("N", 2, 3, 4))
        assert [str(s) for s in forms] == ["N", "H+1", "(H-1)//2", "W//4", "(4*N+2)//3"]

    def test_products_without_such_a_form(self) -> None:
        assert H.floordiv(2).times(2) is None
        assert H.times(0) is None and H.times(-1) is None

    @given(
        st.integers(1, 4),
        st.integers(-9, 9),
        st.integers(-9, 9),
        st.integers(1, 6),
        st.integers(0, 99),
    )
    def test_minus(self, mul: int, add: int, taken: int, div: int, value: int) -> None:
        part = Sym("H", taken, div)
        left = Sym("H", add, 1, mul).minus(part)
        if left is None:
            assert mul * div == 1
            return
        assert left.at(value) == mul * value + add - part.at(value)
        assert math.gcd(left.mul, left.div) == 1
        assert H.minus(W) is None and H.floordiv(2).minus(H) is None

    @given(*(st.integers(1, 9) for _ in range(4)), st.integers(0, 99))
    def test_joined(self, mul: int, add: int, mul2: int, add2: int, value: int) -> None:
        total = Sym("H", add, 1, mul).joined(Sym("H", add2, 1, mul2))
        assert total is not None and total.at(value) == (mul + mul2) * value + add + add2
        assert H.joined(W) is None and H.joined(H.floordiv(2)) is None


windows = st.tuples(
    st.integers(1, 7),  # kernel
    st.integers(1, 4),  # stride
    st.integers(0, 5),  # padding
    st.integers(1, 3),  # dilation
)


def brute_force(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Counts the places where a window fits into the padded line."""
    reach = dilation * (kernel - 1) + 1
    return len(range(0, size + 2 * padding - reach + 1, stride))


class TestWindows:
    @given(windows, st.integers(1, 60))
    def test_conv_size_counts_windows(self, window: tuple[int, int, int, int], size: int) -> None:
        assert max(0, conv_size(size, *window)) == brute_force(size, *window)

    @given(st.lists(windows, min_size=1, max_size=8), st.integers(1, 600))
    def test_a_symbolic_chain_is_the_concrete_one(
        self, chain: list[tuple[int, int, int, int]], size: int
    ) -> None:
        symbolic: Dim = H
        number: Dim = size
        for window in chain:
            symbolic, number = conv_size(symbolic, *window), conv_size(number, *window)
        assert isinstance(symbolic, Sym)
        assert symbolic.at(size) == number

    def test_conv_size_is_pytorchs(self) -> None:
        cases = itertools.product(range(1, 11), range(1, 5), (1, 2, 3), (0, 1, 2), (1, 2))
        for size, kernel, stride, padding, dilation in cases:
            x = torch.empty(1, 1, size, 1, device="meta")
            weight = torch.empty(1, 1, kernel, 1, device="meta")
            got = conv_size(size, kernel, stride, padding, dilation)
            if got < 1:
                continue
            y = F.conv2d(x, weight, None, (stride, 1), (padding, 0), (dilation, 1))
            assert got == y.shape[2], (size, kernel, stride, padding, dilation)

    @pytest.mark.parametrize("ceil_mode", [False, True])
    def test_pool_size_is_pytorchs(self, ceil_mode: bool) -> None:
        sizes = itertools.product(range(1, 13), range(1, 5), range(1, 5), (0, 1, 2), (1, 2))
        seen = 0
        for size, kernel, stride, padding, dilation in sizes:
            if padding > kernel // 2:
                continue  # PyTorch refuses
            got = pool_size(size, kernel, stride, padding, dilation, ceil_mode)
            x = torch.empty(1, 1, size, size, device="meta")
            args = (kernel, stride, padding)
            if got < 1:
                with pytest.raises(RuntimeError):
                    F.max_pool2d(x, *args, dilation, ceil_mode)
                continue
            seen += 1
            assert got == F.max_pool2d(x, *args, dilation, ceil_mode).shape[2], (args, size)
            if dilation == 1:
                assert got == F.avg_pool2d(x, *args, ceil_mode).shape[2], (args, size)
        assert seen > 500

    @given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 80))
    def test_symbolic_ceil_mode(self, kernel: int, stride: int, dilation: int, size: int) -> None:
        try:
            symbolic = pool_size(H, kernel, stride, 0, dilation, True)
        except GraphError:
            assert stride > kernel  # the rounding would depend on the size
            return
        number = pool_size(size, kernel, stride, 0, dilation, True)
        assert isinstance(symbolic, Sym) and isinstance(number, int)
        if number > 0:
            assert symbolic.at(size) == number

    def test_ceil_mode_with_padding_needs_numbers(self) -> None:
        with pytest.raises(GraphError, match="needs fixed H and W"):
            pool_size(H, 3, 2, 1, 1, True)


@dataclass(frozen=True)
class Case:
    """An operation and the symbolic shapes that it takes."""

    op: Op
    inputs: tuple[Shape, ...]
    params: dict[str, tuple[int, ...]] = field(default_factory=dict)


IMAGE: Shape = (N, 6, H, W)
HALF: Shape = (N, 6, H.floordiv(2), W)
ALL = (0, 0, 0, 0)
CASES = {
    "conv": Case(Conv2d(), (IMAGE,), {"weight": (4, 6, 1, 1), "bias": (4,)}),
    "conv strided": Case(Conv2d((2, 3), (1, 2)), (IMAGE,), {"weight": (4, 6, 3, 5)}),
    "conv dilated": Case(Conv2d((1, 1), (2, 0), (2, 3)), (IMAGE,), {"weight": (4, 6, 3, 2)}),
    "conv grouped": Case(Conv2d(groups=3), (IMAGE,), {"weight": (9, 2, 2, 2)}),
    "conv even": Case(Conv2d((2, 2), (1, 1)), (IMAGE,), {"weight": (4, 6, 4, 2)}),
    "conv residual": Case(
        Conv2d((2, 2), (1, 1), epilogue=Epilogue(residual=True, activation="relu")),
        (IMAGE, (N, 4, Sym("H", 1, 2), Sym("W", 1, 2))),
        {"weight": (4, 6, 3, 3)},
    ),
    "batchnorm": Case(BatchNorm(), (IMAGE,), {"mean": (6,), "var": (6,), "weight": (6,)}),
    "normalize": Case(Normalize((0.0,) * 3, (1.0,) * 3), ((N, 3, H, W),)),
    "activation": Case(Activation("silu"), (IMAGE,)),
    "softmax": Case(Softmax(1), ((N, 7),)),
    "add": Case(Add("relu"), (IMAGE, IMAGE)),
    "add broadcast": Case(Add(), (IMAGE, (6, 1, 1))),
    "add to a smaller": Case(Add(), ((6, 1, 1), IMAGE)),
    "mul by a scalar": Case(Mul(), (IMAGE, ())),
    "mul per channel": Case(Mul(), (IMAGE, (N, 6, 1, 1))),
    "maxpool": Case(MaxPool((3, 3), (2, 2), (1, 1)), (IMAGE,)),
    "maxpool dilated": Case(MaxPool((3, 2), (1, 2), (1, 0), (2, 1)), (IMAGE,)),
    "maxpool ceil": Case(MaxPool((3, 3), (2, 2), ceil_mode=True), (IMAGE,)),
    "avgpool": Case(AvgPool((2, 3), (2, 1), (1, 0)), (IMAGE,)),
    "avgpool ceil": Case(AvgPool((2, 2), (2, 2), ceil_mode=True), (IMAGE,)),
    "global": Case(GlobalAvgPool(), (IMAGE,)),
    "global flat": Case(GlobalAvgPool(keepdim=False), (IMAGE,)),
    "linear": Case(Linear(), ((N, 6),), {"weight": (3, 6), "bias": (3,)}),
    "linear on rows": Case(Linear(), ((N, 5, 6),), {"weight": (3, 6)}),
    "flatten": Case(Flatten(), ((N, 6, 2, 3),)),
    "flatten last": Case(Flatten(2), ((N, 6, 2, 3),)),
    "flatten one": Case(Flatten(3), ((N, 6, 2, W),)),
    "flatten ones": Case(Flatten(2), ((N, 6, H, 1),)),
    "concat": Case(Concat(1), (IMAGE, (N, 2, H, W), IMAGE)),
    "concat to a variable": Case(Concat(2), ((N, 6, 2, W), IMAGE, (N, 6, 1, W))),
    "pad": Case(Pad((0, 1, 2, 0), (0, 2, 3, 1), -1.0), (IMAGE,)),
    "slice": Case(Slice((0, 0, 1, 0), (None,) * 4, (1, 1, 2, 3)), (IMAGE,)),
    "slice channels": Case(Slice((0, 1, 0, 0), (None, -2, None, None), (1, 2, 1, 1)), (IMAGE,)),
    "slice past the end": Case(Slice(ALL, (None, 99, None, None), (1, 1, 1, 1)), (IMAGE,)),
}


def at(shape: Shape, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(d.at(sizes[d.symbol]) if isinstance(d, Sym) else d for d in shape)


class TestRules:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("sizes", [(2, 13, 10), (1, 9, 9), (3, 16, 7), (0, 12, 11)], ids=str)
    def test_is_pytorchs(self, name: str, sizes: tuple[int, int, int]) -> None:
        case, numbers = CASES[name], dict(zip("NHW", sizes, strict=True))
        shapes = [at(shape, numbers) for shape in case.inputs]
        tensors = {f"x{i}": torch.rand(shape) for i, shape in enumerate(shapes)}
        params = {slot: torch.rand(shape) for slot, shape in case.params.items()}
        node = Node("y", case.op, tuple(tensors), TensorSpec(()), {slot: slot for slot in params})
        want = tuple(evaluate(node, tensors, params).shape)
        assert rule(case.op, list(shapes), case.params) == want
        assert at(rule(case.op, list(case.inputs), case.params), numbers) == want


BAD = {
    "conv channels": (Conv2d(), [(N, 5, H, W)], {"weight": (4, 6, 1, 1)}, "needs 6 channels"),
    "conv groups": (Conv2d(groups=2), [IMAGE], {"weight": (5, 3, 1, 1)}, "do not go into 2"),
    "conv bias": (Conv2d(), [IMAGE], {"weight": (4, 6, 1, 1), "bias": (3,)}, "one value per"),
    "conv rank": (Conv2d(), [(N, 6, H)], {"weight": (4, 6, 1, 1)}, "its input has 3 dimensions"),
    "conv weight rank": (Conv2d(), [IMAGE], {"weight": (4, 6)}, "not enough values"),
    "conv too small": (Conv2d(), [(N, 6, 2, 2)], {"weight": (4, 6, 3, 3)}, "too small"),
    "conv stride 0": (Conv2d((0, 1)), [IMAGE], {"weight": (4, 6, 1, 1)}, "its stride is 0, 1"),
    "conv without weight": (Conv2d(), [IMAGE], {}, "weight"),
    "residual missing": (
        Conv2d(epilogue=Epilogue(residual=True)),
        [IMAGE],
        {"weight": (4, 6, 1, 1)},
        "residual must have the output's shape",
    ),
    "residual misshapen": (
        Conv2d(epilogue=Epilogue(residual=True)),
        [IMAGE, (1, 4, H, W)],
        {"weight": (4, 6, 1, 1)},
        "residual must have the output's shape",
    ),
    "batchnorm": (BatchNorm(), [IMAGE], {"mean": (6,), "var": (5,)}, "one value per channel"),
    "add": (Add(), [IMAGE, (N, 5, H, W)], {}, "sizes 6 and 5 do not broadcast"),
    "add symbols": (Add(), [IMAGE, (N, 6, W, H)], {}, "sizes H and W do not broadcast"),
    "pool too small": (MaxPool((3, 3), (1, 1)), [(N, 6, 2, 9)], {}, "too small"),
    "global rank": (GlobalAvgPool(), [(N, 6)], {}, "not enough values"),
    "linear": (Linear(), [(N, 6)], {"weight": (3, 5)}, "needs 5 features"),
    "linear bias": (Linear(), [(N, 5)], {"weight": (3, 5), "bias": (5,)}, "one value per"),
    "flatten": (Flatten(), [IMAGE], {}, "flattening needs fixed sizes"),
    "concat": (Concat(1), [IMAGE, (N, 6, H, 3)], {}, "agree in every other dimension"),
    "concat ranks": (Concat(1), [IMAGE, (N, 6)], {}, "agree in every other dimension"),
    "concat variables": (Concat(2), [IMAGE, HALF], {}, "H and H//2 cannot be joined"),
    "concat nothing": (Concat(1), [], {}, "cannot take"),
    "pad rank": (Pad((1,), (1,)), [IMAGE], {}, "cannot take"),
    "slice rank": (Slice((0,), (None,), (1,)), [IMAGE], {}, "cannot take"),
    "slice a variable": (Slice(ALL, (None, None, 5, None), (1,) * 4), [IMAGE], {}, "variable size"),
    "slice step 0": (Slice((0,), (None,), (0,)), [(N,)], {}, "its steps is 0"),
    "slice step 0 of a number": (Slice((0,), (None,), (0,)), [(5,)], {}, "cannot take"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str) -> None:
    op, inputs, params, message = BAD[name]
    with pytest.raises(GraphError, match=message) as error:
        rule(op, list(inputs), params)
    assert str(error.value).startswith("y: ")


class TestAten:
    """PyTorch says the shape where all sizes are known, the exporter where they are not."""

    GATHER = Aten("aten.gather.default", '[{"input":0},1,{"input":1}]', "{}", TensorSpec((N, 2)))

    def test_open_sizes(self) -> None:
        assert rule(self.GATHER, [(N, 6), (N, 2)]) == (N, 2)

    def test_known_sizes_with_each_inputs_dtype(self) -> None:
        node = Node("y", self.GATHER, ("x", "i"), TensorSpec((N, 2)))
        values = (Value("x", TensorSpec((N, 6))), Value("i", TensorSpec((N, 2), "int64")))
        graph = Graph(values, (node,), ("y",), {}, "")
        assert infer_shapes(graph, [(5, 6), (5, 2)])["y"] == (5, 2)

    def test_a_size_of_its_input(self) -> None:
        args = '[{"input":0},[{"size":[0,0,0,1]},2,{"size":[0,1,1,2]}]]'
        op = Aten("aten.reshape.default", args, "{}", TensorSpec((N, 2, 3)))
        assert rule(op, [(4, 6)]) == (4, 2, 3)

    def test_a_call_that_does_not_fit(self) -> None:
        with pytest.raises(GraphError, match="y: "):
            rule(self.GATHER, [(4, 6), (4, 2)])  # the index is no int64


class TestInferShapes:
    def graph(self) -> Graph:
        conv = Node(
            "conv",
            Conv2d((2, 2), (1, 1)),
            ("x",),
            TensorSpec((N, 4, Sym("H", 1, 2), Sym("W", 1, 2))),
            {"weight": "w"},
        )
        pool = Node("pool", GlobalAvgPool(keepdim=False), ("conv",), TensorSpec((N, 4)))
        add = Node("add", Add(), ("pool", "y"), TensorSpec((N, 4)))
        values = (Value("x", TensorSpec((N, 3, H, W))), Value("y", TensorSpec((N, 4))))
        return Graph(values, (conv, pool, add), ("add",), {"w": torch.zeros(4, 3, 3, 3)}, "")

    @pytest.mark.parametrize("n", [0, 1, 7])
    def test_every_value(self, n: int) -> None:
        assert infer_shapes(self.graph(), [(n, 3, 9, 8), (n, 4)]) == {
            "x": (n, 3, 9, 8),
            "y": (n, 4),
            "conv": (n, 4, 5, 4),
            "pool": (n, 4),
            "add": (n, 4),
        }

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ([(2, 3, 9, 8)], "1 inputs given, the graph has 2"),
            ([(2, 1, 9, 8), (2, 4)], r"input x has shape \[2, 1, 9, 8\], expected f32\[N, 3, H, W"),
            ([(2, 3, 9), (2, 4)], "input x has shape"),
            ([(2, 3, 9, 8, 1), (2, 4)], "input x has shape"),
            ([(2, 3, 9, 8), (3, 4)], r"input y has shape \[3, 4\], expected f32\[N, 4\]"),
        ],
        ids=["too few", "channels", "rank", "longer", "two batch sizes"],
    )
    def test_inputs_that_do_not_fit(self, shapes: list[tuple[int, ...]], message: str) -> None:
        with pytest.raises(GraphError, match=message):
            bind(self.graph(), shapes)

    def test_too_small_a_picture(self) -> None:
        graph = self.graph()
        wide = Node("wide", MaxPool((9, 9), (1, 1)), ("conv",), TensorSpec(()))
        with pytest.raises(GraphError, match="wide: .* the image is too small"):
            infer_shapes(graph.replace(nodes=(graph["conv"], wide)), [(2, 3, 9, 9), (2, 4)])
