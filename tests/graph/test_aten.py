"""fastres.graph.aten: calls survive being written down, and only harmless ones are read back."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastres.errors import CaptureError, GraphError
from fastres.graph import aten
from fastres.graph.aten import InputOf, SizeOf
from fastres.graph.ir import Aten, Graph, Node
from fastres.graph.shapes import node_shape
from fastres.graph.specs import TensorSpec

SPEC = TensorSpec((2, 3))


def written(*args: Any, overload: str = "aten.add.Tensor", **kwargs: Any) -> Aten:
    return aten.encode(overload, args, kwargs, SPEC)


def read(arg: Any) -> Any:
    """One argument after it was written down, as the operator would get it."""
    text = written(arg).args
    (found,) = (aten._decode(a, [torch.zeros(4, 6)]) for a in msgspec.json.decode(text))
    return found


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


class TestRoundTrip:
    @given(plain)
    def test_plain_arguments(self, arg: Any) -> None:
        found = read(arg)
        assert found == arg and type(found) is type(arg)

    @pytest.mark.parametrize(
        "arg",
        [
            *(torch.float32, torch.bfloat16, torch.int64, torch.bool),
            *(torch.channels_last, torch.contiguous_format, torch.preserve_format),
            torch.strided,
            -math.inf,
        ],
        ids=str,
    )
    def test_pytorchs_own(self, arg: Any) -> None:
        assert read(arg) == arg
        assert written(1, option=arg).kwargs == f'{{"option":{written(arg).args[1:-1]}}}'

    def test_nan(self) -> None:
        assert math.isnan(read(math.nan))

    def test_a_tuple_is_a_list(self) -> None:
        assert read((1, (2.0, None))) == [1, [2.0, None]]

    def test_its_text(self) -> None:
        op = written(InputOf(0), [SizeOf(0, 1), -1], 2.0, dtype=torch.float16)
        assert op == Aten(
            "aten.add.Tensor",
            '[{"input":0},[{"size":[0,1,0,1]},-1],2.0]',
            '{"dtype":{"dtype":"float16"}}',
            SPEC,
        )

    def test_a_device_gives_way_to_the_inputs(self) -> None:
        op = written([2, 3], overload="aten.zeros.default", device=torch.device("cuda", 1))
        assert aten.call(op, [torch.zeros(1, device="meta")]).device.type == "meta"

    def test_a_device_where_there_are_no_inputs(self) -> None:
        op = written([2, 3], overload="aten.zeros.default", device=torch.device("meta"))
        assert aten.call(op, []).device.type == "meta"


class TestCall:
    @pytest.mark.parametrize(
        ("overload", "args"),
        [
            ("aten.blackman_window.periodic", (2**35, True)),
            ("aten.full.default", ([2**20, 2**20], 1)),
            ("aten.arange.default", (2**33,)),
        ],
    )
    def test_numbers_alone_make_no_terabyte(self, overload: str, args: tuple[Any, ...]) -> None:
        with pytest.raises(GraphError, match=r"makes \d+ bytes of numbers alone; up to 1073741824"):
            aten.call(written(*args, overload=overload), ())

    @pytest.mark.parametrize("number", [-1, 7, 1000])
    def test_numbers_alone_name_no_entry_of_a_table(self, number: int) -> None:
        """PyTorch takes any number for a layout, and crashes."""
        op = Aten("aten.kaiser_window.periodic", "[5,true]", f'{{"layout":{number}}}', SPEC)
        with pytest.raises(GraphError, match=rf"periodic with layout {number}"):
            aten.call(op, ())

    @pytest.mark.parametrize("name", ["remainder.int", "__round_to_zero_floordiv.int"])
    def test_numbers_are_not_computed_with(self, name: str) -> None:
        """PyTorch's own crash where they divide by zero."""
        with pytest.raises(GraphError, match="makes no tensor"):
            aten.call(written(1, 0, overload=f"aten.{name}"), ())

    def test_the_shape_of_what_numbers_make_is_not_found_by_making_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        op = written([2, 3], 1.0, overload="aten.full.default")
        monkeypatch.setattr(aten, "call", None)
        node = Node("made", op, (), SPEC)
        assert node_shape(Graph((), (node,), ("made",), {}, ""), node, {}) == (2, 3)

    def test_runs_the_operator(self) -> None:
        x, y = torch.randn(2, 3), torch.randn(2, 3)
        op = written(InputOf(1), InputOf(0), alpha=2)
        assert torch.equal(aten.call(op, [x, y]), y + 2 * x)

    def test_lists_of_inputs(self) -> None:
        x, y = torch.randn(2, 3), torch.randn(2, 3)
        op = written([InputOf(0), InputOf(1), InputOf(0)], 1, overload="aten.cat.default")
        assert torch.equal(aten.call(op, [x, y]), torch.cat((x, y, x), 1))

    @pytest.mark.parametrize("n", [1, 4])
    def test_sizes_follow_the_inputs(self, n: int) -> None:
        op = written(
            InputOf(0), [SizeOf(0, 0), SizeOf(0, 1, 1, 2), 2], overload="aten.view.default"
        )
        assert aten.call(op, [torch.zeros(n, 5, 6)[:, :1].reshape(n, 6)]).shape == (n, 3, 2)

    def test_several_results(self) -> None:
        op = written(InputOf(0), 2, overload="aten.chunk.default")
        with pytest.raises(GraphError, match="aten.chunk.default returns .*not one tensor"):
            aten.call(op, [torch.zeros(4)])

    @pytest.mark.parametrize(
        "args",
        ['[{"odd":1}]', '[{"layout":"sparse"}]', '[{"size":[0]}]', "[{}]", '[{"a":1,"b":2}]'],
    )
    def test_an_unknown_form(self, args: str) -> None:
        op = Aten("aten.relu.default", args, "{}", SPEC)
        with pytest.raises((GraphError, ValueError)):
            aten.call(op, [torch.zeros(4)])


class TestEncode:
    @pytest.mark.parametrize(
        "arg",
        [torch.zeros(1), 1j, object(), {"a": 1}, torch.sparse_coo, torch.complex64, {1}],
        ids=lambda a: type(a).__name__,
    )
    def test_refuses(self, arg: Any) -> None:
        for nested in (arg, [1, [arg]]):
            with pytest.raises(
                CaptureError, match="aten.add.Tensor is called with .* written down"
            ):
                written(InputOf(0), nested)
            with pytest.raises(CaptureError, match="written down"):
                written(InputOf(0), alpha=nested)


class TestResolve:
    def test_an_operator(self) -> None:
        assert aten.resolve("aten.roll.default") is torch.ops.aten.roll.default

    @pytest.mark.parametrize(
        "overload",
        ["", "aten", "aten.roll", "aten.roll.default.more", "prims.add.default", "os.system.x"],
    )
    def test_another_form(self, overload: str) -> None:
        with pytest.raises(GraphError, match="is not of the form aten.NAME.OVERLOAD"):
            aten.resolve(overload)

    @pytest.mark.parametrize(
        "overload",
        [
            "aten.nothing.default",
            "aten.roll.nothing",
            "aten.relu_.default",
            "aten.add.out",
            "aten.copy_.default",
            "aten._foreach_add_.Scalar",
            # attributes of the namespace, not operators
            "aten.name.upper",
            "aten.__class__.mro",
            "aten.roll.__call__",
            "aten.roll.overloads",
        ],
    )
    def test_no_pure_operator(self, overload: str) -> None:
        with pytest.raises(GraphError, match="is no pure operator"):
            aten.resolve(overload)
