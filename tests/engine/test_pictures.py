"""Engines with `io_dtype=torch.uint8` normalise decoded pictures as PyTorch does it outside."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastres
from fastres import Preprocess
from fastres.errors import GraphError, InputError
from fastres.graph import serial
from fastres.graph.ir import Normalize
from fastres.tolerances import errors

ODD = Preprocess(resize=33, crop=None, mean=(0.6, 0.3, 0.4), std=(0.2, 0.3, 0.25), channels="BGR")
CAFFE = Preprocess(mean=(103.5, 116.3, 123.7), std=(1.0, 1.0, 1.0), scale=1.0, channels="BGR")
BACKENDS = ("reference", "cpu")


def noise(n: int, h: int, w: int) -> Tensor:
    """Noise of every value, framed in black: what a padding with bytes would mistake."""
    x = torch.randint(0, 256, (n, h, w, 3), generator=torch.Generator().manual_seed(n))
    x[:, :3], x[:, :, -3:] = 0, 0
    return x.to(torch.uint8)


def normalised(x: Tensor, p: Preprocess, dtype: torch.dtype = torch.float64) -> Tensor:
    """[N, H, W, 3] uint8 → [N, 3, H, W], as anybody writes it."""
    planes = x.to(torch.float64).permute(0, 3, 1, 2)
    planes = planes.flip(1) if p.channels == "BGR" else planes
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (p.mean, p.std))
    return ((planes * p.scale - mean) / std).to(dtype)


def oracle(net: nn.Module, x: Tensor, p: Preprocess) -> Any:
    """The model in float64 on normalised pictures; the net comes back as it was."""
    with torch.no_grad():
        result = net.double()(normalised(x, p))
    net.float()
    return result


def compile(net: nn.Module, size: tuple[int, int] = (33, 35), **given: Any) -> fastres.Engine:
    settings = {"backend": "cpu", "preprocess": ODD, "io_dtype": torch.uint8, **given}
    return fastres.compile(net, fastres.Input((1, 3, *size)), **settings)


@pytest.fixture(scope="module")
def bytes_engine(net: nn.Module) -> fastres.Engine:
    return compile(net)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [Preprocess(), ODD, CAFFE], ids=["imagenet", "odd", "caffe"])
def test_as_the_model_on_normalised_pictures(net: nn.Module, backend: str, p: Preprocess) -> None:
    x = noise(3, 33, 35)
    with compile(net, backend=backend, preprocess=p, verify=True) as engine:
        got = engine(x)
        assert got.dtype == torch.float32 and engine.io_dtype == torch.uint8
        assert errors(got, oracle(net, x, p)).rms < 2e-6
        assert torch.equal(engine(x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)), got)
        assert engine(x[:0]).shape == (0, 10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_padding_is_of_the_normalised_picture(backend: str) -> None:
    """A black picture: bytes padded with 0 would be black further out, and no edge be seen."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1).eval()
    x = torch.zeros(1, 5, 7, 3, dtype=torch.uint8)
    want = oracle(conv, x, ODD)
    mistaken = nn.functional.conv2d(
        normalised(nn.functional.pad(x, (0, 0, 1, 1, 1, 1)), ODD, torch.float32),
        conv.weight,
        conv.bias,
    )
    with compile(conv, (5, 7), backend=backend) as engine:
        assert errors(engine(x), want).rms < 1e-6
    assert errors(mistaken, want).rms > 0.1


def test_half_precision_models(net: nn.Module) -> None:
    x = noise(2, 33, 35)
    want = oracle(net, x, ODD)
    half = net.half()
    try:
        with compile(half, backend="cpu", precision="fp32") as engine:
            got = engine(x)
    finally:
        net.float()
    assert got.dtype == torch.float16 and errors(got, want).rms < 5e-3


def test_batches_in_parts_and_in_flight(net: nn.Module, bytes_engine: fastres.Engine) -> None:
    x = noise(5, 33, 35)
    want = bytes_engine(x)
    with compile(net, max_batch_size=2) as engine:
        assert engine(x).shape == want.shape and torch.allclose(engine(x), want, atol=1e-5)
    parts = [x[:3], x[3:]]
    for got, part in zip(bytes_engine.map(parts), parts, strict=True):
        assert torch.equal(got, bytes_engine(part))
    with compile(net, max_batch_size=2, oversize="error") as engine:
        with pytest.raises(InputError, match="the batch is 5"):
            engine(x)


def test_several_sizes(net: nn.Module) -> None:
    ranged = fastres.Input(((1, 3, 32, 32), (1, 3, 33, 35), (4, 3, 48, 48)))
    settings: Any = {"backend": "cpu", "preprocess": ODD, "io_dtype": torch.uint8}
    with fastres.compile(net, ranged, **settings) as engine:
        assert repr(engine).startswith("Engine(x: u8[N, H, W, 3];")
        for h, w in ((32, 48), (33, 35)):
            x = noise(2, h, w)
            assert errors(engine(x), oracle(net, x, ODD)).rms < 2e-6
        with pytest.raises(InputError, match=r"expected \[N, 32..48, 32..48, 3\], got \[1, 20, "):
            engine(noise(1, 20, 40))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.zeros(1, 3, 33, 35), "expected dtype torch.uint8, got torch.float32; .* itself"),
        (torch.zeros(1, 3, 33, 35, dtype=torch.uint8), r"\[N, 33, 35, 3\], got \[1, 3, 33, 35\]"),
        (torch.zeros(1, 33, 36, 3, dtype=torch.uint8), r"got \[1, 33, 36, 3\]"),
        (torch.zeros(33, 35, 3, dtype=torch.uint8), r"got \[33, 35, 3\]"),
        (torch.zeros(1, 33, 35, 4, dtype=torch.uint8), r"got \[1, 33, 35, 4\]"),
        (np.zeros((1, 33, 35, 3), np.uint8), r"torch.Tensor u8\[N, 33, 35, 3\], got numpy"),
    ],
    ids=["floats", "planes", "size", "no batch", "alpha", "numpy"],
)
def test_what_does_not_fit_is_refused(bytes_engine: fastres.Engine, bad: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        bytes_engine(bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=says):
        bytes_engine.profile(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"preprocess": None}, "say how, by preprocess="),
        ({"io_dtype": torch.float16}, "io_dtype is torch.float16; give torch.uint8"),
        ({"io_dtype": "uint8"}, "io_dtype is 'uint8'"),
        ({"preprocess": Preprocess(std=(1e-310, 1.0, 1.0))}, "does not normalise: .* overflow"),
        ({"preprocess": Preprocess(std=(1e-42, 1.0, 1.0))}, "does not normalise: .* overflow"),
        ({"preprocess": Preprocess(std=(1e-39, 1.0, 1.0))}, "does not normalise: .* overflow"),
        ({"preprocess": Preprocess(mean=(1e39, 1.0, 1.0))}, "does not normalise: .* overflow"),
    ],
    ids=["no preprocess", "fp16", "text", "overflow", "subnormal", "tiny", "large"],
)
def test_compile_refuses(net: nn.Module, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        compile(net, **given)


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Bytes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.mark.parametrize(
    ("model", "inputs", "says"),
    [
        (nn.Conv2d(4, 2, 1), torch.zeros(1, 4, 8, 8), r"takes f32\[N, 4, 8, 8\]; .* leave it out"),
        (nn.Linear(3, 2), torch.zeros(1, 3), r"takes f32\[N, 3\]"),
        (Two(), [torch.zeros(1, 3, 8, 8)] * 2, r"takes f32\[N, 3, 8, 8\], f32"),
        (Bytes(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"takes u8\[N, 3, 8, 8\] already"),
    ],
    ids=["four channels", "rows", "two inputs", "bytes"],
)
def test_other_networks_are_refused(model: nn.Module, inputs: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        fastres.compile(
            model.eval(), inputs, backend="reference", preprocess=ODD, io_dtype=torch.uint8
        )


def test_saved_and_loaded(net: nn.Module, bytes_engine: fastres.Engine, tmp_path: Path) -> None:
    x = noise(2, 33, 35)
    bytes_engine.save(tmp_path / "a.fastres")
    with fastres.load(tmp_path / "a.fastres") as loaded:
        assert loaded.io_dtype == torch.uint8 and loaded.preprocess == ODD
        assert repr(loaded) == repr(bytes_engine)
        assert torch.equal(loaded(x), bytes_engine(x))
        loaded.save(tmp_path / "b.fastres")
        assert (tmp_path / "a.fastres").read_bytes() == (tmp_path / "b.fastres").read_bytes()
        loaded.update_weights(
            {k: 2 * v if k == "fc.bias" else v for k, v in net.state_dict().items()}
        )
        assert torch.allclose(loaded(x) - bytes_engine(x), net.state_dict()["fc.bias"], atol=1e-4)


def test_a_damaged_file(bytes_engine: fastres.Engine) -> None:
    graph, tensors = serial.encode(bytes_engine.graph, bytes_engine.source)
    for damaged, says in (
        (
            graph.replace(b'"std":[0.2', b'"std":[0.0'),
            "x.normalize: .* its std is .*must be above 0",
        ),
        (graph.replace(b'"std":[0.2,', b'"std":['), "length 3"),
        (graph.replace(b'"dtype":"uint8"', b'"dtype":"int8"'), "must alone read an input in uint8"),
    ):
        assert damaged != graph
        with pytest.raises(GraphError, match=says):
            serial.decode(damaged, tensors, [(1, 3, 33, 35)])


def test_info_and_profile_show_it(bytes_engine: fastres.Engine) -> None:
    first = bytes_engine.info.nodes[0]
    assert (first.name, first.op, first.precision) == ("x.normalize", "normalize", "fp32")
    assert "mean=(0.6, 0.3, 0.4)" in str(bytes_engine.graph) and "flip=True" in str(
        bytes_engine.graph
    )
    assert bytes_engine.info.precisions == ("fp32",)
    assert "x.normalize" in {row.name for row in bytes_engine.profile(noise(1, 33, 35)).rows}
    assert repr(bytes_engine).startswith("Engine(x: u8[N, 33, 35, 3]; ")


def test_predict_feeds_bytes(
    net: nn.Module, pictures: tuple[Image.Image, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Preprocess(resize=48, crop=40, channels="BGR")
    with compile(net, (40, 40), preprocess=p) as engine:
        fed: list[Tensor] = []
        run = engine._lowered.executable.run
        monkeypatch.setattr(
            engine._lowered.executable, "run", lambda inputs: (fed.extend(inputs), run(inputs))[1]
        )
        found = engine.predict(pictures, batch_size=2)
        assert [x.dtype for x in fed] == [torch.uint8] * 2
        with torch.no_grad():
            want = net(p.batch(pictures)).softmax(1)
        for prediction, row in zip(found, want, strict=True):
            assert prediction.classes[0] == int(row.argmax())
            assert abs(prediction.probabilities[0] - float(row.max())) < 1e-5
        engine.preprocess = Preprocess(resize=44, crop=40, channels="BGR")
        assert len(engine.predict(pictures)) == 3
        engine.preprocess = Preprocess(resize=44, crop=40)
        with pytest.raises(InputError, match="was compiled to normalise by .*flip=True"):
            engine.predict(pictures)


@pytest.mark.parametrize("backend", BACKENDS)
def test_verify_whole_and_layer_by_layer(net: nn.Module, backend: str) -> None:
    x = noise(4, 33, 35)
    with compile(net, backend=backend) as engine:
        report = fastres.verify(net, engine, [x[:1], x[1:]], layerwise=True)
        assert report.passed and report.images == 4, str(report)
        assert report.layers[0].name == "x.normalize"
        plain = fastres.compile(net, fastres.Input((1, 3, 33, 35)), backend=backend)
        for reference in (plain, plain.graph, engine, engine.graph):
            assert fastres.verify(reference, engine, x, layerwise=True).passed
        with pytest.raises(InputError, match="takes decoded pictures, the candidate does not"):
            fastres.verify(engine, plain, x)
        with pytest.raises(InputError, match="got torch.float32"):
            fastres.verify(net, engine, normalised(x, ODD, torch.float32))


def test_verify_finds_other_numbers(net: nn.Module) -> None:
    """The model has its normalisation from the engine, so what fails here is the kernels' part."""
    x = noise(4, 33, 35)
    with compile(net) as engine:
        node = engine.graph.normalize
        assert node is not None and isinstance(node.op, Normalize)
        wrong = node.with_(op=Normalize(node.op.mean, node.op.std, node.op.scale, flip=False))
        graph = engine.graph.replace(nodes=(wrong, *engine.graph.nodes[1:]))
        with fastres.compile(graph, backend="cpu") as other:
            report = fastres.verify(engine, other, x, bisect=True)
    assert not report.passed and report.bisection is not None
    assert report.bisection.node.name == "x.normalize"


class Rolled(nn.Module):
    """Its first operation is one that no backend of ours has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.roll(x, 1, 2))


def test_fallbacks() -> None:
    model, x = Rolled().eval(), noise(2, 9, 7)
    with compile(model, (9, 7), on_unsupported="fallback", verify=True) as engine:
        assert len(engine.info.fallbacks) == 1
        assert errors(engine(x), oracle(model, x, ODD)).rms < 1e-6


def test_built_graphs_and_programs(net: nn.Module) -> None:
    x = noise(2, 33, 35)
    program = torch.export.export(net, (torch.zeros(2, 3, 33, 35),))
    model = fastres.models.cifar_resnet(8, seed=0).eval()
    graph = fastres.build(model.state_dict(), inputs=fastres.Input((1, 3, 33, 35)))
    settings: Any = {"backend": "cpu", "preprocess": ODD, "io_dtype": torch.uint8, "verify": True}
    for given, same in ((program, net), (graph, model)):
        with fastres.compile(given, **settings) as engine:  # type: ignore[arg-type]
            assert errors(engine(x), oracle(same, x, ODD)).rms < 2e-6


def test_many_callers(bytes_engine: fastres.Engine) -> None:
    xs = [noise(n, 33, 35) for n in (1, 2, 3)]
    want, got = [bytes_engine(x) for x in xs], {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: bytes_engine(xs[i])})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], y) for i, y in enumerate(want))


def test_command_line(net: nn.Module, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fastres.cli.main import app

    path = tmp_path / "bytes.fastres"
    p = Preprocess(resize=36, crop=32)
    with compile(net, (32, 32), preprocess=p) as engine:
        engine.save(path)
    photo = Path(__file__).parents[2] / "examples" / "photos" / "coffee.jpg"
    for arguments in (
        ("predict", path, photo),
        ("bench", path, "--duration", "0.05", "--launches", "1"),
        ("profile", path),
        ("inspect", path, "--graph"),
    ):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
    assert "x.normalize: f32[N, 3, 32, 32] = normalize(x, mean=" in result.stdout
    result = CliRunner().invoke(app, ["predict", str(path), str(photo), "--mean", "0,0,0"])
    assert result.exit_code == 2 and "was compiled to normalise by" in result.output
