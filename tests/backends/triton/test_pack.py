"""Packed weights: layout, one rounding, and what does not fit into fp16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastres.backends.triton.pack import pack
from fastres.errors import UnsupportedError
from fastres.graph.capture import capture
from fastres.options import Input

CPU = torch.device("cpu")


def network(scale: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(1), nn.Linear(24, 5))
    with torch.no_grad():
        model[0].weight *= scale
    return model.eval()


def test_layout_and_dtypes() -> None:
    model = network(1.0)
    packed = pack(capture(model, [Input((1, 4, 4, 4))]).graph, torch.bfloat16, CPU)
    weight = model.state_dict()["0.weight"]
    assert packed["0.weight"].shape == (6, 3, 3, 2) and packed["0.weight"].is_contiguous()
    assert torch.equal(packed["0.weight"].permute(0, 3, 1, 2), weight.bfloat16())
    assert packed["2.weight"].dtype == torch.bfloat16
    assert packed["0.bias"].dtype == packed["2.bias"].dtype == torch.float32


def test_weights_beyond_fp16_are_refused() -> None:
    graph = capture(network(1e7), [Input((1, 4, 4, 4))]).graph
    pack(graph, torch.bfloat16, CPU)
    with pytest.raises(UnsupportedError, match="exceed fp16's 65504; use precision='bf16'"):
        pack(graph, torch.float16, CPU)
