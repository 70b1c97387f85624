"""Questions about what lies around the tensor cores: L2, launches, kernels in place of several."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpu.questions.case import Case
from bench.gpu.questions.kernels import l2_loads, small_step
from bench.kernels.posed import Posed, difference, normal, poisoned
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Tiles
from fastres.kernels.bottleneck_chain import chain_launch
from fastres.kernels.conv2d import conv2d_tma_launches
from fastres.kernels.conv2d.parts import new_parts
from fastres.kernels.geometry import ConvShape
from fastres.kernels.launch import Launch, is_interpreted
from fastres.kernels.tiles import BoxTile, ChainTile
from fastres.kernels.tiles.chain import ChainShape, chain_cost

_LOADED = 4e9  # bytes that a pass of the question about L2 loads
_BUFFER = 16 << 20  # bytes it loads them from: well within L2
_SKEW = 7  # boxes between the starts of two programs
_BLOCK = 512  # elements that a program of the small kernel adds to
_TOLERANCE = 2e-3  # RMS error: long sums in fp32, or three roundings to fp16 in a row


def loads(tiles: Tiles, small: bool) -> Iterator[Case]:
    """Bytes a second from L2 into shared memory, through tensor maps."""
    alone = ((64, 8), (128, 6), (128, 3), (256, 5))
    together = ((64, 8), (128, 6), (256, 3))
    every = [(*a, 1) for a in alone] + [(*a, 2) for a in together] + [(64, 4, 4)]
    for rows, stages, per_sm in every:
        programs = 3 if small else tiles.target.sm_count * per_sm
        boxes = 4 if small else _BUFFER // (rows * 128)
        steps = 6 if small else int(_LOADED / (programs * rows * 128))
        yield Case(
            f"l2: boxes of {rows} rows, {stages} stages, {per_sm} programs per SM",
            "",
            partial(_pose_loads, rows, stages, programs, boxes, steps),
            bytes=programs * steps * rows * 128,
            rotate=False,
        )


def _pose_loads(
    rows: int, stages: int, programs: int, boxes: int, steps: int, device: torch.device
) -> Posed:
    x, w = normal(device, boxes * rows, 64), normal(device, 64, 64, scale=1 / 8)
    y = poisoned(device, programs, 64, rows, dtype=torch.float32)
    launch = Launch(
        l2_loads,
        programs,
        {
            "x": TensorDescriptor.from_tensor(x, [rows, 64]),
            "w": TensorDescriptor.from_tensor(w, [64, 64]),
            "y_ptr": y,
            "STEPS": steps,
            "BOXES": boxes,
            "SKEW": _SKEW,
        },
        {"ROWS": rows},
        num_warps=4,
        num_stages=stages,
    )

    def wrong() -> str | None:
        starts = _SKEW * torch.arange(programs, device=device)
        loaded = (starts[:, None] + torch.arange(steps, device=device)) % boxes
        times = torch.zeros(programs, boxes, dtype=torch.float64, device=device)
        times.scatter_add_(1, loaded, torch.ones_like(loaded, dtype=torch.float64))
        sums = (times @ x.double().view(boxes, -1)).view(programs, rows, 64)
        return difference(y, w.double() @ sums.mT, _TOLERANCE)

    return Posed([launch], wrong)


def launches(small: bool) -> Iterator[Case]:
    """As many tiny kernels as a ResNet-50 has, each in need of the one before; all in one graph."""
    kernels = 4 if small else 54
    for programs, chunks in ((1, 0), (132, 0), (132, 7)):
        ways = ("plain", "dependent", "dependent and weights first")[: 3 if chunks else 2]
        megabytes = 54 * programs * chunks * _BLOCK * 2 / 1e6
        sizes = (kernels, min(programs, 2) if small else programs, chunks)
        for way in ways:
            yield Case(
                f"launch: 54 kernels of {programs} programs, {megabytes:.0f} MB of weights, {way}",
                "",
                partial(_pose_launches, *sizes, way),
            )


def _pose_launches(
    kernels: int, programs: int, chunks: int, way: str, device: torch.device
) -> Posed:
    """Over integers, so that sums are exact: every pass adds the same to x."""
    dependent = way != "plain" and not is_interpreted(small_step)
    x = normal(device, programs * _BLOCK, dtype=torch.float32).round()
    w = normal(device, kernels, programs, chunks, _BLOCK).gt(0).half()
    start, buffers = x.clone(), (x, poisoned(device, programs * _BLOCK, dtype=torch.float32))
    calls = [
        Launch(
            small_step,
            programs,
            {"x_ptr": buffers[i % 2], "w_ptr": w[i], "y_ptr": buffers[1 - i % 2]},
            {
                "CHUNKS": chunks,
                "EARLY": way.endswith("first"),
                "DEPENDENT": dependent,
                "BLOCK": _BLOCK,
            },
            num_warps=4,
            num_stages=1,
            dependent=dependent,
        )
        for i in range(kernels)
    ]

    def wrong() -> str | None:
        once, added = kernels + w.float().sum((0, 2)).flatten(), x - start
        passes = (added / once)[0].round()
        right = passes >= 1 and torch.equal(added, passes * once)
        return None if right else "wrong: not what whole passes add"

    return Posed(calls, wrong)


def chains(tiles: Tiles, small: bool) -> Iterator[Case]:
    """3x3, last 1x1 with residual, next first 1x1: one kernel, or three that read each other's."""
    for stage, side, mid in (("layer1", 56, 64), ("layer2", 28, 128)):
        for batch in (256, 32):
            sizes = (1, 8, 8) if small else (batch, side, side)
            shape = ChainShape(*sizes, mid, 4 * mid, mid)
            cost = chain_cost(shape, 2)
            for way in ("one kernel", "three kernels"):
                yield Case(
                    f"chain: {stage} batch {batch}, {way}",
                    "",
                    partial(_pose_chain, shape, tiles, way),
                    flops=cost.flops,
                    bytes=cost.bytes,
                )


def _pose_chain(s: ChainShape, tiles: Tiles, way: str, device: torch.device) -> Posed:
    pixels = (s.n, s.h, s.w)
    a, residual = normal(device, *pixels, s.mid).relu(), normal(device, *pixels, s.ko).relu()
    w2 = normal(device, s.mid, 3, 3, s.mid, scale=(2 / 9 / s.mid) ** 0.5)
    w3 = normal(device, s.ko, 1, 1, s.mid, scale=(2 / s.mid) ** 0.5)
    w1 = normal(device, s.next_mid, 1, 1, s.ko, scale=(2 / s.ko) ** 0.5)
    b2, b3, b1 = (normal(device, k, dtype=torch.float32) for k in (s.mid, s.ko, s.next_mid))
    out, a_next = poisoned(device, *pixels, s.ko), poisoned(device, *pixels, s.next_mid)

    def wrong() -> str | None:
        ends = torch.tensor([0, s.n - 1], device=device)
        b = _conv(a[ends], w2, b2).relu()
        exact = (_conv(b, w3, b3) + residual[ends].double()).relu()
        after = _conv(exact, w1, b1).relu()
        if bool(torch.isnan(out).any() | torch.isnan(a_next).any()):
            return "elements that were not written, or NaN"
        return difference(out[ends], exact, _TOLERANCE) or difference(
            a_next[ends], after, _TOLERANCE
        )

    target, relu = tiles.target, "relu"
    if way == "one kernel":
        tile = tiles.best(Problem("chain", s, "fp16")).tile
        assert isinstance(tile, ChainTile)
        operands = (a, w2, w3, residual, w1, b2, b3, b1, out, a_next)
        launch = chain_launch(*operands, shape=s, target=target, activation=relu, tile=tile)
        return Posed([launch], wrong, str(tile))
    b = poisoned(device, *pixels, s.mid)
    calls: list[Launch] = []
    chosen = []
    for x, w, bias, r, y in (
        (a, w2, b2, None, b),
        (b, w3, b3, residual, out),
        (out, w1, b1, None, a_next),
    ):
        side = w.shape[1]
        shape = ConvShape(*x.shape, len(w), side, side, padding=(side // 2, side // 2))
        tile = tiles.best(Problem("boxes", shape, "fp16", residual=r is not None)).tile
        assert isinstance(tile, BoxTile)
        calls += conv2d_tma_launches(
            x,
            w.flatten(1),
            bias,
            r,
            y,
            shape=shape,
            target=target,
            activation=relu,
            tile=tile,
            **new_parts(shape, tile, x),
        )
        chosen.append(str(tile))
    return Posed(calls, wrong, "; ".join(chosen))


def _conv(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """NHWC pixels with KRSC weights in float64, same size."""
    planes, filters = x.double().permute(0, 3, 1, 2), w.double().permute(0, 3, 1, 2)
    with torch.backends.cudnn.flags(enabled=False):  # no algorithm that rounds
        y = F.conv2d(planes, filters, bias.double(), padding=w.shape[1] // 2)
    return y.permute(0, 2, 3, 1)
