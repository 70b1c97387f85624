"""fastres.compile and fastres.build: what they take, and what they refuse before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
import fastres.parity.verify
from fastres.engine.engine import Engine
from fastres.errors import BuildError, CaptureError, InputError, ParityError
from fastres.parity.report import ParityReport
from fastres.source import examples, source_of

PhotoBatch = Callable[[int, int], Tensor]


@pytest.fixture(scope="module")
def model(photo_batch: PhotoBatch) -> nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(8, seed=0), photo_batch(32, 32))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "fp4"}, "precision is 'fp4'; supported are None, 'fp32', 'tf32'"),
        ({"hint": "fast"}, "hint is 'fast'"),
        ({"oversize": "drop"}, "oversize is 'drop'"),
        ({"on_unsupported": "ignore"}, "on_unsupported is 'ignore'"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_batch_size": 2.5}, "max_batch_size is 2.5"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": True}, "threads is True"),
        ({"backend": []}, "backend is "),
        (
            {"backend": "gpu"},
            "backend is 'gpu'; there are auto, cpu, triton, tensorrt, ",
        ),
        ({"backend": [1]}, "backend is "),
        ({"inputs": "224"}, "inputs holds str"),
        ({"inputs": [torch.zeros(1, 3, 8, 8), None]}, "inputs holds NoneType"),
        ({"inputs": torch.zeros(())}, "rank"),
        ({"inputs": torch.zeros(4)}, r"an input is \[4\]; .*let the model take \[N, 1\]"),
        ({"inputs": torch.zeros(1, 3, 8, 8, dtype=torch.int16)}, "int16; .* of bfloat16, bool, f"),
        ({"inputs": torch.zeros(1, 3, 0, 8)}, "at least 1"),
        ({"inputs": 5}, "inputs holds int; give dense tensors as examples, or fastres.Input"),
        ({"inputs": torch.zeros(1, 3, 8, 8).to_sparse()}, "a tensor of torch.sparse_coo"),
        ({"inputs": torch.zeros(1, 3, 8, 8).cfloat()}, "a tensor of torch.complex64"),
        ({"backend": None}, "backend is None"),
        ({"device": []}, r"device is \[\]; give a text such as 'cpu', or a torch.device"),
        ({"device": 5}, "device is 5"),
        ({"preprocess": "imagenet"}, "preprocess is 'imagenet'; give a fastres.Preprocess"),
        ({"verify": "yes"}, "verify is 'yes'; give True, False or None"),
        ({"verify": 1}, "verify is 1"),
    ],
)
def test_bad_options(model: nn.Module, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        fastres.compile(model, **options)


@pytest.mark.parametrize("bad", [None, "resnet50", lambda x: x, torch.zeros(1)])
def test_something_that_is_no_model(bad: Any) -> None:
    with pytest.raises(InputError, match="^the model is "):
        fastres.compile(bad)


def test_training_mode_is_refused(model: nn.Module) -> None:
    training = fastres.models.cifar_resnet(8)
    with pytest.raises(CaptureError, match=r"training mode.*model.eval\(\)"):
        fastres.compile(training, fastres.Input((1, 3, 32, 32)))


def test_wrong_number_of_inputs(model: nn.Module) -> None:
    x = torch.zeros(2, 3, 32, 32)
    with pytest.raises(CaptureError, match="torch.export cannot export"):
        fastres.compile(model, [x, x])


def test_exported_program_and_module_agree(model: nn.Module, photo_batch: PhotoBatch) -> None:
    x = photo_batch(3, 32)
    free = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (photo_batch(2, 32),), dynamic_shapes=free)
    with (
        fastres.compile(program, backend="cpu") as a,
        fastres.compile(model, x, backend="cpu") as b,
    ):
        assert torch.equal(a(x), b(x))
        with pytest.raises(InputError, match="expected"):
            a(torch.zeros(1, 3, 33, 32))


def test_graph_brings_its_own_inputs(model: nn.Module, photo_batch: PhotoBatch) -> None:
    image = fastres.Input((4, 3, 32, 32))
    graph = fastres.build(model.state_dict(), inputs=image)
    with fastres.compile(graph, backend="cpu") as engine, torch.no_grad():
        x = photo_batch(2, 32)
        assert torch.allclose(engine(x), model(x), atol=1e-4)
        engine.update_weights(model.state_dict())  # batch counters and all
    with pytest.raises(InputError, match="a Graph has its inputs already"):
        fastres.compile(graph, image)


def test_an_example_needs_no_values(model: nn.Module) -> None:
    with fastres.compile(model, torch.zeros(2, 3, 32, 32, device="meta"), backend="cpu") as engine:
        assert engine.inputs[0].usual == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weights": None}, "weights is NoneType; give a state_dict, or the path of"),
        ({"weights": 5}, "weights is int"),
        ({"weights": []}, "weights is list"),
        ({"weights": {5: torch.zeros(1)}}, "weights holds the name 5"),
        ({"weights": "a\0b.pt"}, "there is no file"),
        ({"weights": "a" * 300 + ".pt"}, "there is no file"),
        ({"spec": 5}, "spec is int; give a fastres.ResNetSpec"),
        ({"spec": 0}, "spec is int"),
        ({"spec": fastres.ResNetSpec(bn_eps="x")}, "bn_eps is 'x'"),  # type: ignore[arg-type]
        ({"spec": fastres.ResNetSpec(head=5)}, "head is 5"),  # type: ignore[arg-type]
        ({"spec": fastres.ResNetSpec(dilate=5)}, "dilate is 5"),  # type: ignore[arg-type]
        ({"inputs": 5}, "inputs is int; give a fastres.Input"),
        ({"inputs": torch.zeros(1, 3, 8, 8)}, "inputs is Tensor"),
        ({"version": 5}, "version is 5; known are 'v1', 'v1.5'"),
        ({"version": []}, r"version is \[\]"),
    ],
)
def test_build_refuses(model: nn.Module, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(BuildError, match=says):
        fastres.build(**{"weights": model.state_dict(), **arguments})


def test_build_needs_the_version_of_a_bottleneck_net() -> None:
    with torch.device("meta"):
        weights = {
            k: torch.zeros(t.shape) for k, t in fastres.models.resnet50().state_dict().items()
        }
    with pytest.raises(BuildError, match="pass version='v1' or version='v1.5'"):
        fastres.build(weights)


def test_verify_on_request(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    image = fastres.Input((2, 3, 32, 32))
    fastres.compile(model, image, backend="cpu", verify=True).close()

    from fastres.backends.cpu import CpuExecutable

    honest = CpuExecutable.run
    monkeypatch.setattr(
        CpuExecutable, "run", lambda self, inputs: [y * 1.001 for y in honest(self, inputs)]
    )
    with pytest.raises(ParityError):
        fastres.compile(model, image, backend="cpu", verify=True)


def test_verify_tries_one_image_and_several_and_both_ends_of_the_range(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, ...]] = []

    def verify(reference: object, engine: Engine, data: list[tuple[Tensor]]) -> ParityReport:
        tried.extend(tuple(x.shape) for (x,) in data)
        return honest(model, engine, data)

    honest = fastres.parity.verify.verify
    monkeypatch.setattr(fastres.parity.verify, "verify", verify)
    ranged = fastres.Input(((2, 3, 24, 28), (4, 3, 32, 32), (8, 3, 40, 36)))
    fastres.compile(model, ranged, verify=True, backend="cpu").close()
    assert set(tried) == {(1, 3, 32, 32), (3, 3, 24, 28), (1, 3, 40, 36)}


def test_verify_where_nobody_said_how_large_pictures_get(model: nn.Module) -> None:
    sizes = ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=sizes)
    fastres.compile(program, backend="cpu", verify=True).close()
    fixed = torch.export.export(model, (torch.zeros(2, 3, 32, 32),))
    with fastres.compile(fixed, backend="cpu", verify=True) as engine:
        assert engine.options.max_batch_size is None
        with pytest.raises(InputError, match=r"expected \[2, 3, 32, 32\], got \[3, 3, 32, 32\]"):
            engine(torch.zeros(3, 3, 32, 32))


def test_verify_feeds_inputs_that_differ() -> None:
    image = fastres.Input((1, 3, 4, 4))
    source = source_of(Minus().eval(), [image, image])
    assert all(not torch.equal(x, y) for x, y in examples(source))


class Minus(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y


def test_verify_of_bytes_and_of_indices() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(2, 4)

        def forward(self, picture: Tensor, index: Tensor) -> Tensor:
            y: Tensor = picture.float().mean((2, 3)) / 255
            return y.mean(1, keepdim=True) + self.table(index[:, 0])

    inputs = [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int64)]
    fastres.compile(Lookup().eval(), inputs, backend="reference", verify=True).close()


UNSOUND: dict[str, tuple[str, float, str]] = {
    "a negative variance": ("bn1.running_var", -1.0, "bn1.running_var holds 1 variances"),
    "statistics out of range": ("bn1.weight", 1e38, "conv1.folded_weight .*overflows"),
    "an infinite variance": ("bn1.running_var", torch.inf, "bn1.running_var .*infinite"),
    "an infinite mean": ("layer1.0.bn2.running_mean", -torch.inf, "bn2.running_mean .*infinite"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_weights_that_would_give_nan_are_refused(model: nn.Module, name: str) -> None:
    key, value, message = UNSOUND[name]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights[key].view(-1)[0] = value
    weights["conv1.weight"] *= 100
    broken = copy.deepcopy(model)
    broken.load_state_dict(weights)
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(CaptureError, match=message):
        fastres.compile(broken, x)
    with fastres.compile(model, x, backend="cpu") as engine:
        before = engine(x)
        with pytest.raises(InputError, match=message):
            engine.update_weights(weights)
        assert torch.equal(engine(x), before)


def test_a_program_brings_its_inputs(model: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,))
    with pytest.raises(InputError, match="ExportedProgram has its inputs already.*torch.export"):
        fastres.compile(program, x)


def test_an_engine_keeps_nothing_in_the_models_memory(tmp_path: Path) -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(1, 3, 2, 2))
            self.register_buffer("which", torch.tensor([2, 0, 1, 1])[:3])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x.index_select(1, self.which) * self.gain[:, :, :1, :1]
            return y

    model, x = Gained().eval().double(), torch.randn(2, 3, 8, 8).double()
    with fastres.compile(model, x, backend="reference") as engine:
        want = engine(x)
        with torch.no_grad():
            model.gain.zero_()
            model.which.zero_()
        assert torch.equal(engine(x), want)
        engine.save(tmp_path / "engine")
    with fastres.load(tmp_path / "engine") as loaded:
        assert torch.equal(loaded(x), want)


def test_a_buffer_that_is_a_view_of_a_weight_is_not_kept_for_new_weights() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)
            view = self.conv.weight.detach()[:, 0, 1:2, 1:2]
            self.register_buffer("view", view, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x) * self.view
            return y

    model, x = Viewing().eval(), torch.randn(1, 3, 8, 8)
    with fastres.compile(model, x, backend="reference") as engine, torch.no_grad():
        want = engine(x)
        torch.testing.assert_close(want, model(x))
        with pytest.raises(InputError, match="the weight view is missing; nothing was changed"):
            engine.update_weights(model.state_dict())
        assert torch.equal(engine(x), want)


def test_several_threads_compile_and_verify(photo_batch: PhotoBatch) -> None:
    x = photo_batch(2, 32)

    def check(seed: int) -> bool:
        net = fastres.models.cifar_resnet(8, seed=seed).eval()
        with fastres.compile(net, x, backend="cpu") as engine:
            return fastres.verify(net, engine, [x], layerwise=True).passed

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(8)))


def test_weights_tied_in_the_model_stay_tied() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.b = nn.Conv2d(3, 3, 3, padding=1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).relu())
            return y

    x = torch.randn(2, 3, 8, 8)
    model = Twice().eval()
    with fastres.compile(model, x, backend="cpu") as engine, torch.no_grad():
        assert torch.allclose(engine(x), model(x), atol=1e-5)
        weights = {t.data_ptr() for n, t in engine.graph.constants.items() if t.dim() == 4}
        assert len(weights) == 1


def test_constants_that_no_state_dict_holds_survive_new_weights() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("shift", torch.randn(4, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x) + self.shift
            return y

    x = torch.randn(2, 3, 4, 4)
    model = Shifted().eval()
    with fastres.compile(model, x, backend="cpu") as engine, torch.no_grad():
        model.conv.weight.mul_(2)
        engine.update_weights(model.state_dict())
        assert torch.allclose(engine(x), model(x), atol=1e-5)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "settings",
    [
        lambda: torch.device("meta"),
        lambda: default_dtype(torch.float64),
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["device", "dtype", "inference", "autocast"],
)
def test_the_callers_settings_change_nothing(
    settings: Callable[[], AbstractContextManager[Any]], tmp_path: Path
) -> None:
    """A default device or dtype is for what the caller makes."""
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten())
    model, x = nn.Sequential(*parts, nn.Linear(8, 5)).eval(), torch.randn(4, 3, 8, 8)
    pictures = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)

    def everything() -> list[Tensor]:
        bytes_in = {"io_dtype": torch.uint8, "preprocess": fastres.Preprocess()}
        with fastres.compile(model, x, backend="cpu", verify=True) as engine:
            engine.save(tmp_path / "engine")
            assert fastres.verify(model, engine, [x]).passed
            found = [engine(x)]
        with fastres.load(tmp_path / "engine") as loaded:
            found.append(loaded(x))
        with fastres.compile(model, x, backend="cpu", calibration=[x]) as engine:
            assert engine.options.precision == "int8"
            found.append(engine(x))
        with fastres.compile(model, x, backend="cpu", **bytes_in) as engine:
            found.append(engine(pictures))
        return found

    want = everything()
    with settings():
        found = everything()
    assert all(map(torch.equal, found, want))
