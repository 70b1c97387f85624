"""fastres.graph.failed_export: why PyTorch cannot export a model, where, and what helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastres
from fastres.errors import CaptureError
from fastres.options import Input

SMALL = Input((1, 3, 64, 64))


class Base(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pool, self.head = nn.AvgPool2d(70), nn.Linear(4, 5)
        for name, value in attributes.items():
            setattr(self, name, value)


class Asserts(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 96:  # not an assert, which pytest would give words
            raise AssertionError
        return self.conv(x)


class Raises(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (96, 80):
            raise ValueError(f"expected 96x80, got {x.shape[-2:]}\nand more")
        return self.conv(x)


class TooSmall(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x)).flatten(1))


class TakesMore(Base):
    def forward(self, x: Tensor, scale: float, *, bias: Tensor | None = None) -> Tensor:
        return self.conv(x) * scale


class ByName(Base):
    def forward(self, *, pixel_values: Tensor) -> Tensor:
        return self.conv(pixel_values)


class TakesText(Base):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        batch, length = input_ids.shape
        return input_ids * batch * length


class TakesList(Base):
    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.cat(images)


class TakesDict(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.conv(batch["image"])


class LeavesPyTorch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


class ReturnsAnObject(Base):
    def forward(self, x: Tensor) -> object:
        return SMALL if self.head is None else Result(self.conv(x))


class Result:
    def __init__(self, y: Tensor) -> None:
        self.y = y


class Decides(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if y.mean() > 0 else -y


class Detects(nn.Module):
    """As a detection network: a backbone, and a number of boxes that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 1, 1))

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        scores = self.head(self.backbone(torch.stack(list(images)))).flatten()
        boxes = scores[scores > 0]
        return [boxes] if len(boxes) > 3 else []


class Config:
    image_size = [96, 80]


CASES: dict[str, tuple[nn.Module, list[str]]] = {
    "an assertion without words": (
        Asserts(),
        [
            "inputs [[2, 3, 64, 64]]: AssertionError (at ",
            "test_failed_export.py:31 `raise AssertionError`)",
            "give an example of the size, channels and dtype that the model was made for",
        ],
    ),
    "timm's word for the size": (
        Asserts(default_cfg={"input_size": (3, 96, 80)}),
        ["made for pictures of 96x80: give an example of that size, torch.randn(1, 3, 96, 80)"],
    ),
    "transformers' word": (
        Raises(config=Config()),
        ["ValueError: expected 96x80, got torch.Size", "made for pictures of 96x80"],
    ),
    "torchvision's word": (Asserts(image_size=96), ["made for pictures of 96x96"]),
    "no such size": (Asserts(image_size=64), ["the size, channels and dtype"]),
    "too small a picture": (TooSmall(), ["RuntimeError: ", "Output size is too small (at "]),
    "more inputs": (
        TakesMore(),
        [
            "for inputs [[2, 3, 64, 64]]: TakesMore.forward takes (x: 'Tensor', scale: 'float'",
            "Give one example for each input that it needs",
        ],
    ),
    "by name alone": (ByName(), ["ByName.forward takes (pixel_values", "torch.export.export"]),
    "text": (TakesText(), ["`batch, length = input_ids.shape`", "forward takes (input_ids: "]),
    "a list": (TakesList(), ["TypeError: ", "forward takes (images: 'list[Tensor]')", "tensors"]),
    "a dict": (TakesDict(), ["(at ", 'batch["image"]', "(batch: 'dict[str, Tensor]')"]),
    "NumPy": (LeavesPyTorch(), ["`return torch.from_numpy(x.numpy() * 2)`", "leaves PyTorch"]),
    "an object": (ReturnsAnObject(), ["Result'> in output", "tuples, lists, dicts or namedtuples"]),
    "values": (
        Decides(),
        ["`return y if y.mean() > 0 else -y`", "It decides by values", "Rewrite that line"],
    ),
    "detection": (
        Detects(),
        [
            "`return [boxes] if len(boxes) > 3 else []`",
            "Its part 'backbone' takes one picture: compile that, model.backbone, or 'backbone.0'",
        ],
    ),
    "weights of another dtype": (
        nn.Sequential(nn.Conv2d(3, 4, 3)).half(),
        ["The example is torch.float32, the weights are torch.float16: give an example in theirs"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_says_where_and_what_to_do(name: str) -> None:
    model, parts = CASES[name]
    given = Input(SMALL.shape, dtype=torch.float32)
    with pytest.raises(CaptureError) as caught:
        fastres.compile(model.eval(), given, backend="reference")
    said = str(caught.value)
    assert said.startswith(f"torch.export cannot export {type(model).__name__} for inputs [[2, ")
    assert "\n" not in said and len(said) < 700
    assert all(part in said for part in parts), said


def test_a_picture_without_a_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(CaptureError, match=r"no batch dimension: give x\[None\]"):
        fastres.compile(model, torch.randn(3, 8, 8), backend="reference")


def test_the_parts_that_it_names_compile() -> None:
    """A whole detection network does not; what is said of its parts is so."""
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    hooks = torch.nn.modules.module._global_forward_pre_hooks.copy()
    with pytest.raises(CaptureError, match="'backbone' takes one picture.*or 'backbone.body'"):
        fastres.compile(model, x, backend="reference")
    assert torch.nn.modules.module._global_forward_pre_hooks == hooks
    with fastres.compile(model.backbone, x, backend="reference") as engine:
        assert fastres.verify(model.backbone, engine, [x]).passed
        assert list(engine(x)) == ["0", "1", "2", "p6", "p7"]
