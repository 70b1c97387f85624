"""Calibration data of every kind: what is taken, and what is told of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastres
from fastres.errors import InputError
from fastres.quantization.data import Batches

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


def batches(data: Any, samples: int = 100, **changes: Any) -> list[Tensor]:
    settings: dict[str, Any] = {"inputs": 1, "preprocess": None, "seed": 0, **changes}
    return [batch[0] for batch in Batches(data, samples, **settings)]


@pytest.fixture
def rows() -> Tensor:
    return torch.arange(20.0).view(20, 1, 1, 1).expand(20, 3, 4, 4).contiguous()


def test_tensors_and_arrays_are_drawn_from(rows: Tensor) -> None:
    assert torch.equal(torch.cat(batches(rows)), rows)
    some = torch.cat(batches(rows, 6))
    assert len(some) == 6
    assert torch.equal(some, torch.cat(batches(rows.numpy(), 6)))
    assert torch.equal(some, torch.cat(batches(rows, 6)))
    assert not torch.equal(some, torch.cat(batches(rows, 6, seed=1)))


def test_iterables_give_their_first_images(rows: Tensor) -> None:
    labelled = TensorDataset(rows, torch.arange(20))
    for data in (
        DataLoader(labelled, batch_size=7),
        (part for part in rows.split(7)),
        [part.numpy() for part in rows.split(7)],
        [(part, "label") for part in rows.split(7)],
    ):
        assert torch.equal(torch.cat(batches(data, 9)), rows[:9])


def test_an_iterable_is_read_no_further_than_needed(rows: Tensor) -> None:
    taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        while True:
            taken += 1
            yield rows[:4]

    assert len(torch.cat(batches(endless(), 8))) == 8
    assert taken <= 3


def test_folders_need_a_preprocess() -> None:
    preprocess = fastres.Preprocess(resize=40, crop=32)
    assert torch.cat(batches(str(PHOTOS), preprocess=preprocess)).shape == (3, 3, 32, 32)
    assert len(torch.cat(batches(PHOTOS, 2, preprocess=preprocess))) == 2
    with pytest.raises(InputError, match="say how pictures become inputs"):
        batches(PHOTOS)
    with pytest.raises(InputError, match="there is no file or folder"):
        batches("/nowhere", preprocess=preprocess)


@pytest.mark.parametrize("data", [5, None, object(), 3.5])
def test_other_things_are_no_data(data: Any) -> None:
    with pytest.raises(InputError, match="data is"):
        batches(data)


def test_arrays_of_no_numbers_are_refused() -> None:
    objects = np.array([None, 1])
    for data in (objects, [objects]):
        with pytest.raises(InputError, match="an array of object, which is no data"):
            list(Batches(data, 4, inputs=1, preprocess=None, seed=0))


@pytest.mark.parametrize("item", ["text", None, [], torch.tensor(1.0), torch.zeros(0, 3, 4, 4), {}])
def test_batches_that_are_none_are_named(rows: Tensor, item: Any) -> None:
    with pytest.raises(InputError, match="batch 1 of the calibration data"):
        batches([rows[:2], item])


def test_a_list_of_pictures_is_taken_with_a_preprocess() -> None:
    preprocess = fastres.Preprocess(resize=40, crop=32)
    paths = sorted(PHOTOS.glob("*.jpg"))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    wanted = torch.cat(batches(PHOTOS, preprocess=preprocess))
    for data in (paths, [str(path) for path in paths], tuple(pictures)):
        assert torch.equal(torch.cat(batches(data, preprocess=preprocess)), wanted)
        with pytest.raises(InputError, match="calibration data is a .* of pictures or of paths"):
            batches(data)


def test_batches_that_are_dicts_are_read_by_the_names_of_the_inputs(rows: Tensor) -> None:
    parts = [{"labels": torch.zeros(len(x)), "pixel_values": x} for x in rows.split(7)]
    assert torch.equal(torch.cat(batches(parts, names=["pixel_values", "labels"])), rows)
    labelled = [(part, 3) for part in parts]
    assert torch.equal(torch.cat(batches(labelled, names=["pixel_values"])), rows)
    both = [
        tuple(b)
        for b in Batches(
            parts, 9, inputs=2, preprocess=None, seed=0, names=["pixel_values", "labels", "more"]
        )
    ]
    assert both[0][1].shape == (7,)
    says = "batch 0 of the calibration data is a dict with labels, pixel_values; .* called x"
    with pytest.raises(InputError, match=says):
        batches(parts, names=["x"])
    with pytest.raises(InputError, match="the calibration data is dict"):
        batches(parts[0], names=["pixel_values"])


def test_images_are_called_by_what_they_came_as(rows: Tensor) -> None:
    preprocess = fastres.Preprocess(resize=40, crop=32)
    settings: dict[str, Any] = {"inputs": 1, "preprocess": preprocess, "seed": 0}
    folder = Batches(PHOTOS, 2, **settings)
    assert Path(folder.called(1)).parent == PHOTOS
    drawn = Batches(rows, 6, **settings)
    (some,) = list(drawn)[0]
    assert [f"image {int(x[0, 0, 0])}" for x in some] == [drawn.called(i) for i in range(6)]
    assert Batches([rows], 6, **settings).called(4) == "image 4"


def test_the_first_batch_is_looked_at_and_not_lost(rows: Tensor) -> None:
    data = Batches((part for part in rows.split(7)), 9, inputs=1, preprocess=None, seed=0)
    assert torch.equal(data.first()[0], rows[:7]) and torch.equal(data.first()[0], rows[:7])
    assert torch.equal(torch.cat([x for (x,) in data]), rows[:9])
    with pytest.raises(InputError, match="empty; .* used up"):
        data.first()


class Gray(nn.Module):
    """Takes [N, H, W], and turns it itself into what its convolution takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x.unsqueeze(1)).relu().mean((2, 3)))


class Last(nn.Module):
    """Takes [N, H, W, 3]; its first convolution sees what the second is given."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, 4, 1)
        self.first = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.permute(0, 3, 1, 2)).relu()).mean((2, 3))


class Folded(nn.Module):
    """Four pixels become channels before the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.PixelUnshuffle(2)
        self.conv = nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.down(x)).relu().mean((2, 3))


def plain(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Gray(), (8, 12, 12)),
        (Gray(), (3, 12, 12)),
        (Last(), (8, 12, 12, 3)),
        (Folded(), (8, 3, 12, 12)),
        (plain(1), (8, 1, 12, 12)),
        (plain(12), (8, 12, 12, 3)),  # three columns
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU()), (8, 6)),
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU()), (8, 5, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_no_sound_data_are_refused(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    data = torch.randn(shape).to(dtype)
    assert fastres.quantize(model.eval(), [data], algorithm="minmax").samples == shape[0]


def never(*given: Any, **named: Any) -> Any:
    raise AssertionError("the model was exported")


FLOATS = torch.randn(8, 3, 12, 12)
BYTES = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (BYTES, r"uint8\[8, 3, 12, 12\].*: decoded pictures; .*\(x.float\(\) / 255 - mean"),
        (BYTES.permute(0, 2, 3, 1).numpy(), "channels last; .*x.permute.0, 3, 1, 2..float"),
        (list(BYTES), r"uint8\[3, 12, 12\].*: decoded .* torch.stack"),
        (
            list(BYTES.permute(0, 2, 3, 1).numpy()),
            "channels last; .*x.permute.2, 0, 1.* torch.stack",
        ),
        (BYTES.long(), r"int64\[8, 3, 12, 12\].*: no floating point"),
        (BYTES > 5, "bool.*: no floating point"),
        (FLOATS.permute(0, 2, 3, 1), "its channels are last: give x.permute.0, 3, 1, 2"),
        (FLOATS.permute(0, 2, 3, 1).double().numpy(), "its channels are last"),
        (list(FLOATS), "it is a single image: give batches, such as torch.stack"),
        ([(x, 4) for x in FLOATS], "it is a single image"),
        (FLOATS[0], "it is a single image"),
        (list(FLOATS.permute(0, 2, 3, 1)), "a single image, channels last: x.permute.2, 0, 1"),
        (DataLoader(TensorDataset(FLOATS), batch_size=None), "it is a single image"),
        (TensorDataset(FLOATS), "dataset of single images; .*DataLoader.dataset, batch_size=8"),
        (FLOATS[:, :1], r"pictures are gray, .*x.expand\(-1, 3"),
        (FLOATS[:, :1].permute(0, 2, 3, 1), r"gray, .*permute\(0, 3, 1, 2\).expand"),
        (torch.randn(8, 4, 12, 12), r"alpha channel: give x\[:, :3\]"),
        (torch.randn(2, 4, 3, 12, 12), "several batches in one: give x.flatten.0, 1"),
        ([(torch.arange(8), FLOATS)], "labels, and then images; give images first"),
        ([{"image": FLOATS}], "a dict with image; the model's inputs are called input"),
        ([Image.new("RGB", (12, 12))], "is a list of pictures"),
        ([(Image.new("RGB", (12, 12)), 3)], "a picture, Image: give a list of pictures alone"),
        (["a.jpg", "b.jpg"], "is a list of pictures or of paths: say how"),
        ([("a.jpg", 1)], "is the path a.jpg: give a list"),
        (np.array([None, FLOATS], object), "an array of object"),
        ([np.array([[1, 2], None], object)], "an array of object"),
        ([[[0.5, 0.25]]], "holds list; give tensors"),
        ([], "is empty"),
        (DataLoader(TensorDataset(FLOATS[:3]), batch_size=4, drop_last=True), "is empty"),
        (iter(()), "used up"),
        (TensorDataset, "is type; give a tensor"),
    ],
)
def test_the_wrong_kind_is_told_before_the_model_is_exported(
    data: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastres.source.capture", never)
    for ask in (
        lambda: fastres.quantize(plain(), data),
        lambda: fastres.quantize(plain(), data, inputs=fastres.Input((1, 3, 12, 12))),
    ):
        with pytest.raises(InputError, match=says) as caught:
            ask()
        assert "calibration data" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (BYTES, "decoded pictures"),
        ([FLOATS.permute(0, 2, 3, 1)], "its channels are last"),
        (list(FLOATS), "it is a single image"),
        ([{"image": FLOATS}], "a dict with image"),
        (np.array([None]), "an array of object"),
        ([], "is empty"),
    ],
)
def test_compile_and_export_tell_it_too(
    data: Any, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastres.source.capture", never)
    with pytest.raises(InputError, match=says):
        fastres.compile(plain(), FLOATS[:1], calibration=data)
    with pytest.raises(InputError, match=says):
        fastres.export(plain(), tmp_path / "m.onnx", inputs=FLOATS[:1], calibration=data)


def test_what_is_tried_leaves_nothing_in_the_model() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.scale = torch.full((4, 1, 1), 2.0)  # no buffer
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.scale * self.conv(x)
            self.seen.append(self.last)
            return self.last.mean((2, 3))

    model = Keeps().eval()
    with pytest.raises(InputError, match="its channels are last"):
        fastres.quantize(model, FLOATS.permute(0, 2, 3, 1))
    assert not hasattr(model, "last") and not model.seen and not model.scale.is_meta


def test_later_batches_are_told_as_well() -> None:
    says = r"float32\[2, 12, 12, 3\] after 8 images; .*: its channels are last"
    with pytest.raises(InputError, match=says):
        fastres.quantize(plain(), [FLOATS, FLOATS[:2].permute(0, 2, 3, 1)])


def test_a_model_s_own_name_of_its_input_is_taken() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.net(pixel_values)  # type: ignore[no-any-return]

    model, batch = Named().eval(), {"labels": torch.arange(8), "pixel_values": FLOATS}
    table = fastres.quantize(model, DataLoader([batch], batch_size=None), algorithm="minmax")
    assert table.samples == 8
    engine = fastres.compile(model, FLOATS[:1], calibration=[batch], backend="reference")
    torch.testing.assert_close(engine(FLOATS), model(FLOATS), rtol=0, atol=0.02)


def test_graphs_and_programs_say_what_they_take() -> None:
    program = torch.export.export(
        plain(), (FLOATS[:2],), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},)
    )
    assert fastres.quantize(program, [{"input": FLOATS}], algorithm="minmax").samples == 8
    with pytest.raises(InputError, match="its channels are last"):
        fastres.quantize(program, FLOATS.permute(0, 2, 3, 1))
