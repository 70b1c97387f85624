"""fastres.parity.verify: sound engines pass, wrong outputs do not, and the report says why."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres import models
from fastres.compiler import compile
from fastres.engine.engine import Engine
from fastres.errors import InputError, ParityError
from fastres.graph.capture import capture
from fastres.options import Input
from fastres.parity.references import full_precision
from fastres.parity.verify import verify

PhotoBatch = Callable[[int, int], Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Sound:
    """A network and how it is compiled; it must pass, layers included."""

    factory: Callable[[], nn.Module]
    size: int
    backend: str = "cpu"
    precision: Any = "fp32"


SOUND = {
    "resnet18": Sound(lambda: models.resnet18(seed=0), 64),
    "resnet50": Sound(lambda: models.resnet50(seed=0), 64),
    "cifar20": Sound(lambda: models.cifar_resnet(20, seed=0), 32),
    "cifar20 bf16": Sound(lambda: models.cifar_resnet(20, seed=0), 32, precision="bf16"),
    "cifar20 reference": Sound(lambda: models.cifar_resnet(20, seed=0), 32, backend="reference"),
    "preact20": Sound(lambda: models.preact_resnet(20, seed=0), 32),
}


@pytest.mark.parametrize("case", SOUND.values(), ids=SOUND.keys())
def test_a_sound_engine_passes(
    case: Sound, photo_batch: PhotoBatch, request: pytest.FixtureRequest
) -> None:
    if case.precision == "bf16":
        request.getfixturevalue("bf16")
    x = photo_batch(4, case.size)
    model = models.settle(case.factory(), photo_batch(8, case.size))
    with compile(model, x, backend=case.backend, precision=case.precision) as engine:
        report = verify(model, engine, x, layerwise=True, bisect=True)
        assert report.passed, str(report)
        assert report.first_failing_layer is None and report.bisection is None
        assert [row.name for row in report.layers] == [node.name for node in engine.graph]
        assert report.outputs[0].top1 == 1.0
        assert report.outputs[0].spread > 0.1
        report.raise_if_failed()


@pytest.mark.parametrize("factory", [models.resnet18, models.resnet50])
def test_on_an_unsettled_net_faults_do_not_show(
    factory: Callable[..., nn.Module], images: Tensor
) -> None:
    """Why every model here is settled: with all means and betas dropped the error is exactly 0.0.

    A fresh BatchNorm has mean 0 and beta 0; on a settled net dropping one mean of one channel gives
    1.4e-1, against an allowance of 2.6e-6 (tests/parity/test_parity_layers.py).
    """
    fresh = factory(seed=0).eval()
    mutant = copy.deepcopy(fresh)
    for module in mutant.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()  # type: ignore[union-attr]
            nn.init.zeros_(module.bias)
    own = verify(fresh, fresh, images)
    report = verify(fresh, mutant, images)
    assert report.passed
    assert report.outputs[0].rms == own.outputs[0].rms


def test_a_graph_is_a_reference(net: nn.Module, engine: Engine, images: Tensor) -> None:
    graph = capture(net, [Input((1, 3, 64, 64))]).graph
    report = verify(graph, engine, images, layerwise=True)
    assert report.passed, str(report)
    assert [row.name for row in report.layers] == [node.name for node in engine.graph]


def test_an_engine_is_a_reference(net: nn.Module, engine: Engine, images: Tensor) -> None:
    """Its own graph is then the oracle; a fault that both share cannot show."""
    assert verify(engine, engine, images, layerwise=True).passed
    mutant = copy.deepcopy(net)
    nn.init.zeros_(mutant.layer2[0].bn1.bias)
    with compile(mutant, images, backend="reference") as other:
        report = verify(engine, other, images, bisect=True)
    assert report.bisection is not None and report.bisection.node.name == "layer2.0.conv1"


def test_any_callable_is_a_candidate(net: nn.Module, images: Tensor) -> None:
    """Judged in the precision of what it returns."""
    assert verify(net, lambda x: net(x), images).passed
    half = copy.deepcopy(net).bfloat16()
    report = verify(net, lambda x: half(x.bfloat16()), images)
    assert report.passed and "bfloat16" in report.policy
    report = verify(net, lambda x: half(x.bfloat16()).float(), images)
    assert not report.passed and "float32" in report.policy
    with pytest.raises(InputError, match="look inside an Engine"):
        verify(net, net, images, layerwise=True)
    with pytest.raises(InputError, match="candidate is int"):
        verify(net, 3, images)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reference is int"):
        verify(3, net, images)  # type: ignore[arg-type]


class Structured(nn.Module):
    """Two inputs, a dict of a tensor and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"sum": self.a(x) + self.a(y), "parts": [self.b(x), self.b(y)]}


def test_every_leaf_of_the_output_is_compared(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Structured().eval()
    batch = (images, images.flip(0))
    with compile(model, batch, backend="cpu") as engine:
        assert verify(model, engine, [batch], layerwise=True).passed
    mutant = copy.deepcopy(model)
    nn.init.zeros_(mutant.b.bias[:1])
    with compile(mutant, batch, backend="cpu") as engine:
        report = verify(model, engine, [batch], layerwise=True, bisect=True)
    rows = {row.name: row.passed for row in report.outputs}
    assert rows == {"['sum']": True, "['parts'][0]": False, "['parts'][1]": False}
    assert report.bisection is not None and report.bisection.node.name == "b"


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (lambda y: (y,), "returns TreeSpec(tuple"),
        (lambda y: y.tolist(), "returns TreeSpec(list"),
        (lambda y: y[:, :5], "shape [4, 5], expected [4, 10]"),
        (lambda y: y.masked_fill(y == y.max(), math.nan), "1 of 40 values are NaN"),
        (lambda y: y / 0, "40 of 40 values are NaN or infinite, expected 0"),
        (lambda y: y + 1e-2, "largest error"),
    ],
    ids=["tuple", "list", "shape", "NaN", "infinite", "values"],
)
def test_a_wrong_output_says_what_is_wrong(
    candidate: Callable[[Tensor], Any], reason: str, net: nn.Module, images: Tensor
) -> None:
    report = verify(net, lambda x: candidate(net(x)), images)
    assert not report.passed
    assert report.outputs[0].reason.startswith(reason)
    with pytest.raises(ParityError, match="does not match ResNet: output: "):
        report.raise_if_failed()


def test_nan_where_the_model_has_nan_is_right(images: Tensor) -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    model = Log().eval()
    assert verify(model, lambda x: x.log(), images).passed
    assert not verify(model, lambda x: x.log().nan_to_num(0.0), images).passed


class Widening(Engine):
    """An engine that returns another dtype than its model."""

    def __call__(self, *inputs: Tensor) -> Any:
        return super().__call__(*inputs).double()


def test_an_engine_must_return_its_models_dtype(
    net: nn.Module, engine: Engine, images: Tensor
) -> None:
    wide = Widening.__new__(Widening)
    vars(wide).update(vars(engine))
    report = verify(net, wide, images)
    assert report.outputs[0].reason == "dtype torch.float64, expected torch.float32"


def test_batches_are_aggregated(net: nn.Module, engine: Engine, images: Tensor) -> None:
    whole = verify(net, engine, images)
    parts = verify(net, engine, (images[i : i + 2] for i in (0, 2)), layerwise=True)
    assert parts.passed and parts.images == whole.images == 4
    # the last bits depend on the batch size, the oracle's spread does not
    assert parts.outputs[0].spread == pytest.approx(whole.outputs[0].spread)
    assert parts.outputs[0].rms == pytest.approx(whole.outputs[0].rms, rel=1.0)


def test_atol_and_rtol_replace_the_policy(net: nn.Module, engine: Engine, images: Tensor) -> None:
    exact = copy.deepcopy(net).double()(images.double())
    for atol, rtol in ((0.0, None), (1e-7, 0.0), (None, 1e-3), (1e-4, 1e-4)):
        report = verify(net, engine, images, atol=atol, rtol=rtol)
        close = torch.allclose(engine(images).double(), exact, atol=atol or 0, rtol=rtol or 0)
        assert report.passed is close, (atol, rtol)
        assert report.policy.startswith("|candidate - oracle| <= ")
        assert math.isnan(report.outputs[0].allowed_rms)
    assert verify(net, engine, images, atol=1e-4).passed
    assert not verify(net, engine, images, atol=0.0).passed
    for wrong in ({"atol": -1.0}, {"rtol": math.nan}, {"atol": math.inf}, {"rtol": "a"}):
        with pytest.raises(InputError, match="must be a number of at least 0"):
            verify(net, engine, images, **wrong)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 3, 64, 64), "batch 0 is empty"),
        ([torch.zeros(2, 3, 64, 64), torch.zeros(0, 3, 64, 64)], "batch 1 is empty"),
        (torch.tensor(1.0), "batch 0 is empty"),
        ([()], "batch 0 is empty"),
        ([], "holds no batch"),
        ([[1.0, 2.0]], "batch 0 holds float"),
        (["photo.jpg"], "batch 0 holds str"),
        (3, "data is int"),
        (torch.zeros(2, 3, 64, 64, device="meta"), "batch 0 holds a tensor on the meta device"),
        ([torch.zeros(2, 3, 64, 64).to_sparse()], "batch 0 holds a tensor of torch.sparse_coo"),
    ],
    ids=str,
)
def test_data_that_cannot_be_compared_is_refused(
    data: Any, message: str, net: nn.Module, engine: Engine
) -> None:
    with pytest.raises(InputError, match=message):
        verify(net, engine, data)


def test_nothing_but_nan_is_no_proof(net: nn.Module, engine: Engine, images: Tensor) -> None:
    nan = torch.full_like(images, math.nan)
    report = verify(net, engine, nan)
    assert not report.passed
    assert report.outputs[0].reason == "nothing was compared: no value of the oracle is finite"
    assert not verify(net, engine, nan, atol=1.0).passed
    assert verify(net, engine, [nan, images]).passed


def test_a_reference_in_training_mode_is_refused(
    net: nn.Module, engine: Engine, images: Tensor
) -> None:
    with pytest.raises(InputError, match="call model.eval"):
        verify(copy.deepcopy(net).train(), engine, images)


def test_the_reference_is_left_as_it_was(net: nn.Module, engine: Engine, images: Tensor) -> None:
    before = copy.deepcopy(net.state_dict())
    verify(net, engine, images, layerwise=True)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not net.training


def test_a_weak_check_says_so(net: nn.Module, engine: Engine, images: Tensor) -> None:
    """A constant of 1000 in every logit: what tells images apart is 0.03 % of the norm."""
    constant = copy.deepcopy(net)
    nn.init.constant_(constant.fc.bias, 1000.0)
    report = verify(constant, constant, images)
    assert report.outputs[0].spread < 1e-3
    assert any("a weak check" in note for note in report.notes)
    assert verify(net, engine, images).notes == ()
    assert "not centred" in verify(net, engine, images[:1]).notes[0]


def test_the_report_reads_well(net: nn.Module, images: Tensor) -> None:
    mutant = copy.deepcopy(net)
    nn.init.zeros_(mutant.layer2[0].bn1.bias)
    with compile(mutant, images, backend="reference") as engine:
        report = verify(net, engine, images, layerwise=True, bisect=True)
    text = str(report)
    assert text.startswith("FAILED: Engine(x: f32[N, 3, 64, 64]; ")
    assert "against ResNet, 4 images" in text.splitlines()[0]
    assert "first layer beyond its bound: layer2.0.conv1: largest error" in text
    assert "fed with the oracle's inputs it is still wrong" in text
    assert "executable of their own" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("│")) <= 120
    layers = [line for line in text.splitlines() if line.startswith("│ layer")]
    assert [line.split()[-2] for line in layers].count(
        "PASSED"
    ) == 5  # layer1, and layer2's shortcut
    found = json.loads(report.to_json())
    assert found["passed"] is False and found["outputs"][0]["rms"] == report.outputs[0].rms
    assert found["bisection"]["node"]["name"] == "layer2.0.conv1"
    assert found["layers"][0]["top1"] is None  # nan


def test_full_precision_is_switched_on_and_back() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with pytest.raises(KeyError), full_precision():
            assert matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
            raise KeyError
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_the_baseline_does_not_profit_from_the_callers_settings(
    net: nn.Module, engine: Engine, images: Tensor
) -> None:
    strict = verify(net, engine, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loose = verify(net, engine, images)
    assert loose.outputs[0].allowed_rms == strict.outputs[0].allowed_rms
