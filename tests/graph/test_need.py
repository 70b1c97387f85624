"""What a graph from a file would take: counted on the meta device, before anything is run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import fastres
from fastres.errors import GraphError
from fastres.graph.allowance import BASE, OF_FILE, OF_INPUT, WORK, Allowance
from fastres.graph.ir import Aten, Concat, Conv2d, Graph, MaxPool, Node, Pad, Value
from fastres.graph.need import need
from fastres.graph.passes.pipeline import optimise
from fastres.graph.specs import Sym, TensorSpec

N = Sym("N")
F32 = 4


def graph(*nodes: Node, shape: tuple[Any, ...] = (N, 3, 8, 8), **constants: torch.Tensor) -> Graph:
    """A network of one input, x, that returns what its last node gives."""
    tree = pytree.tree_structure(0)
    return Graph((Value("x", TensorSpec(shape)),), nodes, (nodes[-1].name,), constants, tree)


def call(name: str, overload: str, args: str, shape: tuple[Any, ...], **more: Any) -> Node:
    spec = TensorSpec(shape, more.pop("dtype", "float32"))
    reads = more.pop("reads", ("x",))
    return Node(name, Aten(overload, args, "{}", spec, **more), reads, spec)


def relu(name: str, reads: str, shape: tuple[Any, ...]) -> Node:
    return call(name, "aten.relu.default", '[{"input":0}]', shape, reads=(reads,))


class TestBytes:
    def test_of_what_is_there_at_once(self) -> None:
        chain = [relu(b, a, (N, 3, 8, 8)) for a, b in ("xa", "ab", "bc", "cd")]
        one = 2 * 3 * 8 * 8 * F32
        # an operand, and the result twice: PyTorch's own count of what its call makes
        assert need(graph(*chain), [(2, 3, 8, 8)]).bytes == 3 * one

    def test_a_value_stays_until_its_last_reader(self) -> None:
        wide = (N, 6, 8, 8)
        join = Node("c", Concat(1), ("x", "b"), TensorSpec(wide))
        found = need(graph(relu("b", "x", (N, 3, 8, 8)), join), [(2, 3, 8, 8)])
        assert found.bytes == 2 * (3 + 3 + 6) * 64 * F32

    def test_what_a_call_makes_meanwhile_counts(self) -> None:
        outer = call(
            "y", "aten.einsum.default", '["nchw,ndhw->ncd",[{"input":0},{"input":0}]]', (N, 3, 3)
        )
        assert need(graph(outer), [(2, 3, 8, 8)]).bytes > 2 * 3 * 64 * F32 + 2 * 9 * F32

    def test_nothing_is_allocated(self) -> None:
        spec = TensorSpec((N, 3, 2**20, 2**20))
        pad = Node("y", Pad((0, 0, 0, 0), (0, 0, 2**20 - 8, 2**20 - 8)), ("x",), spec)
        last = call("z", "aten.leaky_relu.default", '[{"input":0}]', spec.shape, reads=("y",))
        assert need(graph(pad, last), [(1, 3, 8, 8)]).bytes > 3 * 2**42


class TestOperations:
    def test_of_convolutions_and_pools(self) -> None:
        spec = TensorSpec((N, 16, 8, 8))
        conv = Node("y", Conv2d(padding=(1, 1)), ("x",), spec, {"weight": "w"})
        sums = 2 * 16 * 64 * 27
        found = need(graph(conv, w=torch.zeros(16, 3, 3, 3)), [(2, 3, 8, 8)]).operations
        assert sums <= found < 2.5 * sums
        pool = Node("y", MaxPool((101, 101), (1, 1), (50, 50)), ("x",), TensorSpec((N, 3, 8, 8)))
        assert need(graph(pool), [(2, 3, 8, 8)]).operations > 2 * 3 * 64 * 101**2

    def test_of_products_inside_a_call(self) -> None:
        product = call("y", "aten.matmul.default", '[{"input":0},{"input":0}]', (1, 1, 512, 512))
        found = need(graph(product, shape=(1, 1, 512, 512)), [(1, 1, 512, 512)]).operations
        assert 512**3 <= found < 2 * 512**3

    def test_of_windows_inside_a_call(self) -> None:
        args = '[{"input":0},[1,7,7],[1,1,1],[0,3,3]]'
        pool = call("y", "aten.avg_pool3d.default", args, (1, 3, 8, 8))
        assert need(graph(pool, shape=(1, 3, 8, 8)), [(1, 3, 8, 8)]).operations > 192 * 7**2


class TestRefusals:
    @pytest.mark.parametrize(
        ("node", "why"),
        [
            (call("y", "aten.relu.default", '[{"input":0}]', (N, 3, 8, 9)), "claims"),
            (
                call("y", "aten.relu.default", '[{"input":0}]', (N, 3, 8, 8), dtype="int64"),
                "claims",
            ),
            (call("y", "aten.roll.default", '[{"input":0},[1],[7]]', (N, 3, 8, 8)), "refused"),
            (call("y", "aten.dropout.default", '[{"input":0},0.5,true]', (N, 3, 8, 8)), "random"),
            (call("y", "aten.to_sparse.default", '[{"input":0}]', (N, 3, 8, 8)), "meta device"),
            (call("y", "aten.max.dim", '[{"input":0},1]', (N, 8, 8), index=2), "not one tensor"),
        ],
    )
    def test_calls(self, node: Node, why: str) -> None:
        with pytest.raises(GraphError, match=why):
            need(graph(node), [(2, 3, 8, 8)])

    def test_a_list_of_millions(self) -> None:
        shape = (1, 1, 1, 2**26)
        split = call("y", "aten.split.Tensor", '[{"input":0},1,3]', (1, 1, 1, 1), index=0)
        with pytest.raises(GraphError, match="more than 16384 values"):
            need(graph(split, shape=shape), [shape])

    def test_a_call_of_millions_of_calls(self) -> None:
        shape = (1, 1, 1, 2**20)
        diff = call("y", "aten.diff.default", f'[{{"input":0}},{2**40}]', (1, 1, 1, 0))
        with pytest.raises(GraphError, match="more than 10000 calls"):
            need(graph(diff, shape=shape), [shape])

    def test_a_dropout_that_is_off_is_taken(self) -> None:
        off = call("y", "aten.dropout.default", '[{"input":0},0.5,false]', (N, 3, 8, 8))
        assert need(graph(off), [(2, 3, 8, 8)]).bytes > 0


class TestAllowance:
    def test_grows_with_the_file_and_with_what_is_given(self) -> None:
        sizes = {"file": OF_FILE * 10**6, "given": OF_INPUT * 10**6}
        side = math.isqrt((BASE + min(sizes.values()) // 2) // (3 * F32))
        spec = TensorSpec((1, 1, side, side))
        pad = Node("y", Pad((0,) * 4, (0, 0, side - 1, side - 1)), ("x",), spec)
        wide = graph(
            pad, Node("z", Concat(1), ("y", "y"), TensorSpec((1, 2, side, side))), shape=(1,) * 4
        )
        with pytest.raises(GraphError, match=r"a file of 0.0 MiB may take 64.0 MiB.*max_bytes="):
            Allowance(0).check(wide, [(1, 1, 1, 1)])
        Allowance(2 * 10**6).check(wide, [(1, 1, 1, 1)])
        Allowance(0).check(wide, [(1, 1, 1, 1)], given=10**6)

    def test_a_network_that_is_meant_well_stays_far_below(self) -> None:
        """ResNet-50 at batch 256 holds a 24th of what a file of its size may, docs/security.md."""
        weights = fastres.models.resnet50(seed=0).state_dict()
        found = need(optimise(fastres.build(weights, version="v1.5")), [(256, 3, 224, 224)])
        size, given = sum(t.nbytes for t in weights.values()), 256 * 3 * 224 * 224 * F32
        allowed = BASE + OF_FILE * size + OF_INPUT * given
        assert 24 < allowed / found.bytes < 26 and found.operations < WORK * allowed / 10

    def test_the_number_in_the_message_is_enough(self) -> None:
        product = call("y", "aten.matmul.default", '[{"input":0},{"input":0}]', (1, 1, 4096, 4096))
        net, shape = graph(product, shape=(1, 1, 4096, 4096)), (1, 1, 4096, 4096)
        with pytest.raises(GraphError) as found:
            Allowance(0).check(net, [shape])
        most = int(str(found.value).rpartition("max_bytes=")[2].rstrip(")"))
        Allowance(0, most).check(net, [shape])
        with pytest.raises(GraphError):
            Allowance(0, most - 1).check(net, [shape])
        assert WORK * most >= need(net, [shape]).operations
