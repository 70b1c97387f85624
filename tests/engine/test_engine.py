"""The engine: what it accepts, what it refuses, threads, splitting, predicting, closing."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.errors import FastresError, InputError

PhotoBatch = Callable[[int, int], Tensor]


@pytest.fixture(scope="module")
def model(photo_batch: PhotoBatch) -> nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(20, seed=0), photo_batch(32, 32))


@pytest.fixture(scope="module")
def engine(model: nn.Module) -> Iterator[fastres.Engine]:
    with fastres.compile(model, fastres.Input((4, 3, 32, 32)), backend="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def ranged(model: nn.Module) -> Iterator[fastres.Engine]:
    shapes = ((1, 3, 24, 24), (2, 3, 32, 32), (8, 3, 48, 40))
    with fastres.compile(model, fastres.Input(shapes), backend="cpu") as engine:
        yield engine


def close(y: Tensor, model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(y, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_any_batch_size(
    engine: fastres.Engine, model: nn.Module, photo_batch: PhotoBatch, size: int
) -> None:
    x = photo_batch(size, 32)
    y = engine(x)
    assert type(y) is Tensor and y.dtype == x.dtype and not y.requires_grad
    assert close(y, model, x)


def test_empty_batch(engine: fastres.Engine) -> None:
    y = engine(torch.empty(0, 3, 32, 32))
    assert y.shape == (0, 10) and y.dtype == torch.float32


def test_channels_last_and_strided_inputs(engine: fastres.Engine, photo_batch: PhotoBatch) -> None:
    x = photo_batch(4, 32)
    y = engine(x)
    assert torch.equal(engine(x.contiguous(memory_format=torch.channels_last)), y)
    wide = torch.zeros(4, 3, 32, 64)
    wide[..., ::2] = x
    assert torch.equal(engine(wide[..., ::2]), y)


def test_input_is_not_changed_and_outputs_are_not_reused(
    engine: fastres.Engine, photo_batch: PhotoBatch
) -> None:
    a, b = photo_batch(4, 32), photo_batch(4, 32).flip(0)
    kept = a.clone()
    first = engine(a)
    copy = first.clone()
    engine(b)
    assert torch.equal(a, kept) and torch.equal(first, copy)


def test_a_pending_minus_sign(engine: fastres.Engine, photo_batch: PhotoBatch) -> None:
    x = photo_batch(2, 32)
    negative = torch._neg_view(x)
    assert negative.is_neg() and torch.equal(engine(negative), engine(-x))
    assert engine.profile(negative).rows


def test_gradients_stay_out(engine: fastres.Engine, photo_batch: PhotoBatch) -> None:
    x = photo_batch(2, 32).requires_grad_()
    assert not engine(x).requires_grad


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.float64), "dtype torch.float32, got torch.float64"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(2, 4, 32, 32), r"expected \[N, 3, 32, 32\], got \[2, 4, 32, 32\]"),
        (torch.zeros(2, 3, 32, 33), r"got \[2, 3, 32, 33\]"),
        (torch.zeros(3, 32, 32), r"got \[3, 32, 32\]"),
        (torch.zeros(()), r"got \[\]"),
        (torch.zeros(2, 3, 32, 32, device="meta"), "on cpu, got meta"),
        (torch.zeros(2, 3, 32, 32).to_sparse(), "expected a dense tensor"),
        ([[1.0]], "got builtins.list"),
        (None, "got builtins.NoneType"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(engine: fastres.Engine, bad: object, says: str) -> None:
    engine(torch.zeros(2, 3, 32, 32))  # what was right once makes nothing else so
    with pytest.raises(InputError, match=says):
        engine(bad)


def test_nested_tensors_are_refused(engine: fastres.Engine, model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that they are no finished feature
        nested = torch.nested.as_nested_tensor([torch.zeros(3, 32, 32)] * 2)
    with pytest.raises(InputError, match="expected a dense tensor on cpu, got a nested tensor"):
        engine(nested)
    with pytest.raises(InputError, match="inputs holds a nested tensor"):
        fastres.compile(model, nested)


def test_number_of_inputs(engine: fastres.Engine) -> None:
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(InputError, match=r"expected 1 inputs \(x\), got 2"):
        engine(x, x)
    with pytest.raises(InputError, match="got 0"):
        engine()


def test_nan_goes_through_as_in_pytorch(
    engine: fastres.Engine, model: nn.Module, photo_batch: PhotoBatch
) -> None:
    x = photo_batch(2, 32)
    x[0, 0, 5, 5] = float("nan")
    with torch.no_grad():
        want = model(x)
    got = engine(x)
    assert torch.equal(got.isnan(), want.isnan()) and want[0].isnan().all()


def test_ranged_sizes(ranged: fastres.Engine, model: nn.Module, photo_batch: PhotoBatch) -> None:
    for height, width in ((24, 24), (32, 40), (48, 40), (33, 31)):
        x = photo_batch(2, 48)[:, :, :height, :width].contiguous()
        assert close(ranged(x), model, x)
    with pytest.raises(
        InputError, match=r"expected \[N, 3, 24..48, 24..40\], got \[1, 3, 49, 32\]"
    ):
        ranged(torch.zeros(1, 3, 49, 32))
    assert ranged(torch.empty(0, 3, 30, 30)).shape == (0, 10)


def test_large_batches_are_split(model: nn.Module, photo_batch: PhotoBatch) -> None:
    x = photo_batch(7, 32)
    example = fastres.Input((3, 3, 32, 32))
    with fastres.compile(model, example, max_batch_size=3, backend="cpu") as engine:
        y = engine(x)
        assert y.shape == (7, 10) and close(y, model, x)
        assert torch.equal(y[:3], engine(x[:3]))
    with (
        fastres.compile(
            model, example, max_batch_size=3, oversize="error", backend="cpu"
        ) as engine,
        pytest.raises(InputError, match="the batch is 7, max_batch_size is 3"),
    ):
        engine(x)


class Both(nn.Module):
    """Two pictures of one size, their sum, and their mean over the batch."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, (x * y).mean(0)


def test_an_empty_batch_gives_what_pytorch_gives() -> None:
    inputs = [torch.ones(2, 3, 8, 8)] * 2
    with fastres.compile(Both().eval(), inputs, backend="reference") as engine:
        got = engine(torch.empty(0, 3, 8, 8), torch.empty(0, 3, 8, 8))
    assert got[0].shape == (0, 3, 8, 8)
    assert got[1].shape == (3, 8, 8) and got[1].isnan().all()


def test_an_empty_batch_for_which_there_is_no_result() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[0] * 2

    x = torch.rand(2, 3, 8, 8)
    with fastres.compile(First().eval(), x, backend="reference") as engine:
        assert torch.equal(engine(x), 2 * x[0])
        with pytest.raises(InputError, match="the batch is empty, and the model has no result"):
            engine(x[:0])


def test_the_limit_holds_for_every_input() -> None:
    class Apart(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, y * 3

    inputs = [torch.ones(2, 3), torch.ones(2, 3)]
    with (
        fastres.compile(
            Apart().eval(), inputs, backend="reference", max_batch_size=3, oversize="error"
        ) as engine,
        pytest.raises(InputError, match="the batch is 9, max_batch_size is 3"),
    ):
        engine(torch.ones(2, 3), torch.ones(9, 3))


def test_closing_lets_calls_under_way_end(model: nn.Module, photo_batch: PhotoBatch) -> None:
    x = photo_batch(40, 32)
    engine = fastres.compile(model, x[:1], backend="reference", max_batch_size=1)
    want = engine(x)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(engine, x)
        while not call.running():
            time.sleep(0.001)
        time.sleep(0.02)
        engine.close()
        assert torch.equal(call.result(), want)
    with pytest.raises(FastresError, match="closed"):
        engine(x)


def test_a_forked_process_is_told(engine: fastres.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(FastresError, match="before the process was forked"):
        engine(torch.zeros(1, 3, 32, 32))


def test_inputs_that_must_be_of_one_size() -> None:
    image = fastres.Input(((1, 3, 6, 6), (1, 3, 8, 8), (1, 3, 20, 20)))
    with fastres.compile(Both().eval(), [image, image], backend="reference") as engine:
        x, y = torch.rand(2, 2, 3, 9, 7)
        assert torch.equal(engine(x, y)[0], x + y)
        with pytest.raises(InputError, match=r"the W of the inputs before it, 7; got .*9, 9\]"):
            engine(x, torch.rand(2, 3, 9, 9))
        with pytest.raises(InputError, match=r"the N of the inputs before it, 2; got \[3"):
            engine(x, torch.rand(3, 3, 9, 7))


def test_many_threads_get_bit_identical_results(
    engine: fastres.Engine, photo_batch: PhotoBatch
) -> None:
    batches = [photo_batch(2 + i % 3, 32).roll(i, 3) for i in range(24)]
    want = [engine(x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            got = list(pool.map(engine, batches))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_map_keeps_the_order(engine: fastres.Engine, photo_batch: PhotoBatch) -> None:
    batches = [photo_batch(1 + i % 4, 32).roll(i, 2) for i in range(9)]
    for depth in (1, 2, 4):
        got = list(engine.map(iter(batches), depth=depth))
        assert all(torch.equal(a, engine(b)) for a, b in zip(got, batches, strict=True))
    assert list(engine.map([])) == []


def test_map_is_lazy_and_passes_errors_on(engine: fastres.Engine) -> None:
    drawn = 0

    def source() -> Iterator[Tensor]:
        nonlocal drawn
        for _ in range(100):
            drawn += 1
            yield torch.zeros(1, 3, 32, 32)
        yield torch.zeros(1, 5)

    results = engine.map(source(), depth=2)
    next(results)
    assert drawn < 6
    with pytest.raises(InputError, match="expected"):
        list(results)
    with pytest.raises(InputError, match="got builtins.int"):
        list(engine.map([3]))
    with pytest.raises(InputError, match="depth is 0"):
        engine.map([], depth=0)
    with pytest.raises(InputError, match="depth is True"):
        engine.map([], depth=True)
    with pytest.raises(InputError, match="batches is int"):
        engine.map(5)


def test_throughput_hint(model: nn.Module, photo_batch: PhotoBatch) -> None:
    x = photo_batch(2, 32)
    with fastres.compile(model, x, hint="throughput", backend="cpu") as engine:
        assert all(close(y, model, x) for y in engine.map([x] * 5))


def test_info_names_what_was_fused(engine: fastres.Engine) -> None:
    info = engine.info
    assert info.backend == "cpu" and info.precision == "fp32" and not info.fallbacks
    by_name = {node.name: node for node in info.nodes}
    second = by_name["layer1.0.conv2"]
    assert [name.rsplit(".", 1)[1] for name in second.fused] == ["conv2", "bn2", "add", "relu_1"]
    assert second.precision == "fp32" and second.op == "conv2d"
    assert "layer1.0.conv2" in str(info) and '"backend": "cpu"' in info.to_json()


def test_profile_times_every_convolution(engine: fastres.Engine, photo_batch: PhotoBatch) -> None:
    profile = engine.profile(photo_batch(4, 32))
    text = str(profile)
    assert "layer3.2.conv2" in text
    assert "roofline" not in text  # the rates of this processor are not known
    with pytest.raises(InputError, match="nothing to profile"):
        engine.profile(torch.empty(0, 3, 32, 32))


def test_profile_writes_a_trace(net: nn.Module, photo_batch: PhotoBatch, tmp_path: Path) -> None:
    x, file = photo_batch(2, 32), tmp_path / "trace.json"
    with fastres.compile(net, x, backend="reference") as engine:
        rows = engine.profile(x, trace=file).rows
        events = json.loads(file.read_text())["traceEvents"]
        assert any(event["name"] == "aten::conv2d" for event in events) and rows
        before = file.stat().st_ino
        engine.profile(x, trace=file)
        assert file.stat().st_ino == before  # written to; nothing is put in its place
        for path in (tmp_path, tmp_path / "none" / "trace.json", 5):
            with pytest.raises(InputError, match="trace=.* cannot be written"):
                engine.profile(x, trace=path)  # type: ignore[arg-type]


def test_closed(model: nn.Module, photo_batch: PhotoBatch) -> None:
    x = photo_batch(1, 32)
    with fastres.compile(model, x, backend="cpu") as engine:
        pass
    engine.close()
    for use in (
        lambda: engine(x),
        lambda: engine.info,
        lambda: engine.map([x]),
        lambda: engine.profile(x),
    ):
        with pytest.raises(FastresError, match="this engine was closed"):
            use()


def test_repr(engine: fastres.Engine) -> None:
    assert repr(engine) == "Engine(x: f32[N, 3, 32, 32]; 26 nodes on cpu in fp32)"


def test_predict(model: nn.Module, pictures: tuple[object, ...]) -> None:
    preprocess = fastres.Preprocess(resize=32, crop=32)
    with fastres.compile(
        model, fastres.Input((1, 3, 32, 32)), preprocess=preprocess, backend="cpu"
    ) as engine:
        found = engine.predict(pictures, batch_size=2, top_k=3)
        assert len(found) == 3 and all(len(p.classes) == 3 for p in found)
        with torch.no_grad():
            want = model(preprocess.batch(pictures)).softmax(1).topk(3)
        assert [list(p.classes) for p in found] == want.indices.tolist()
        assert sum(len(p.classes) for p in engine.predict(pictures[:1], top_k=99)) == 10
        with pytest.raises(InputError, match="there is no file"):
            engine.predict(["nowhere.png"])
        for number in (0, True, 2.5, "3"):
            with pytest.raises(InputError, match=f"top_k is {number!r}"):
                engine.predict(pictures, top_k=number)
            with pytest.raises(InputError, match=f"batch_size is {number!r}"):
                engine.predict(pictures, batch_size=number)
        assert engine.predict(pictures, batch_size=np.int64(2), top_k=np.int64(3)) == found
        for lone in ("photo.jpg", pictures[0], np.asarray(pictures[0]), 5, None):
            with pytest.raises(InputError, match="give a list of images"):
                engine.predict(lone)


def test_predict_needs_to_know_the_preprocessing(engine: fastres.Engine) -> None:
    with pytest.raises(InputError, match="no preprocess"):
        engine.predict([])
