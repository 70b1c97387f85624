"""fastres.parity.oracle: the program's own calls give the module's own activations."""

import ast
import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastres.parity.oracle
from fastres import models
from fastres.errors import InputError
from fastres.graph.capture import Captured, capture
from fastres.options import Input
from fastres.parity.oracle import activations, walk

PhotoBatch = Callable[[int, int], Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")


def captured(model: nn.Module, size: int = 32, **options: object) -> Captured:
    return capture(model.eval(), [Input((2, 3, size, size), **options)])


def hooked(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every leaf module returned, by its path; a second call of one gets _1, and so on."""
    found: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            count = calls.get(name, 0)
            calls[name] = count + 1
            found[f"{name}_{count}" if count else name] = output.clone()

        return hook

    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        single = type(module).__module__.startswith("torch.nn.") and not list(module.children())
        if single and not isinstance(module, nn.Identity | nn.Sequential):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        model(x)
    return found


@pytest.mark.parametrize(
    ("factory", "size"),
    [
        (lambda: models.cifar_resnet(20, seed=0), 32),
        (lambda: models.preact_resnet(8, seed=0), 32),
        (lambda: models.resnet50(seed=0), 64),
        (lambda: torchvision.models.resnet18(), 64),  # ReLU and addition in place
    ],
    ids=["cifar20", "preact8", "resnet50", "torchvision resnet18"],
)
def test_activations_are_those_that_hooks_see(
    factory: Callable[[], nn.Module], size: int, photo_batch: PhotoBatch
) -> None:
    x = photo_batch(3, size)  # exported with a batch of 2
    model = models.settle(factory(), x)
    ours = activations(captured(model, size), [x])
    theirs = hooked(model.double(), x.double())
    assert theirs.keys() <= ours.keys()
    assert len(theirs) > 20
    for name, value in theirs.items():
        assert ours[name].dtype == torch.float64
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-11)


def test_dtype_is_that_of_the_whole_computation(photo_batch: PhotoBatch) -> None:
    x = photo_batch(2, 32)
    model = models.settle(models.cifar_resnet(8, seed=0), x)
    found = activations(captured(model), [x], dtype=torch.bfloat16)
    with torch.no_grad():
        expected = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    torch.testing.assert_close(found["fc"], expected, rtol=0, atol=0)


class InPlace(nn.Module):
    """Every way in which a later call changes an earlier value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y.sigmoid()
        y.relu_()
        y += z
        return y.flatten(1)


def test_in_place_calls_leave_what_was_recorded_before_them() -> None:
    torch.manual_seed(0)
    model, x = InPlace().eval(), torch.randn(2, 3, 4, 4)
    found = activations(captured(model, 4), [x])
    conv = model.double().conv(x.double()).detach()
    assert conv.min() < 0
    for name, expected in {
        "conv": conv,
        "sigmoid": conv.sigmoid(),
        "relu": conv.relu(),
        "add": conv.relu() + conv.sigmoid(),
        "flatten": (conv.relu() + conv.sigmoid()).flatten(1),
    }.items():
        torch.testing.assert_close(found[name], expected, msg=name)


def test_only_what_must_be_is_cloned() -> None:
    """add_ and flatten share one storage; conv and relu had it before and keep copies."""
    found = activations(captured(InPlace(), 4), [torch.randn(2, 3, 4, 4)])
    storages = {name: value.untyped_storage().data_ptr() for name, value in found.items()}
    assert storages["add"] == storages["flatten"]
    assert len(set(storages.values())) == 4


class WritesToItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_() * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inputs_are_not_written_to(dtype: torch.dtype) -> None:
    x = torch.full((2, 3, 4, 4), -1.0)
    activations(captured(WritesToItsInput(), 4), [x], dtype=dtype)
    assert (x == -1).all()


class NamesDtypes(nn.Module):
    """A model that says float32 here and there, and reads its batch size."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.full((3, 1, 1), 1 / 3, dtype=torch.float32)
        y = torch.nn.functional.avg_pool2d(x.to(torch.float32) * scale, 2)
        return y.softmax(1, dtype=torch.float32).reshape(x.size(0), -1)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_named_dtypes_do_not_round_and_sizes_follow_the_batch(batch: int) -> None:
    x = torch.randn(batch, 3, 4, 4, dtype=torch.float64)
    found = list(activations(captured(NamesDtypes(), 4), [x]).values())[-1]
    expected = torch.nn.functional.avg_pool2d(x / 3, 2).softmax(1).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_some_names_are_those_of_all(photo_batch: PhotoBatch) -> None:
    x = photo_batch(2, 32)
    program = captured(models.settle(models.cifar_resnet(8, seed=0), x))
    every = activations(program, [x])
    assert every.keys() == set(program.values.values())
    some = activations(program, [x], names={"bn1", "layer2.0.add"})
    assert some.keys() == {"bn1", "layer2.0.add"}
    assert all(torch.equal(value, every[name]) for name, value in some.items())
    assert activations(program, [x], names=()) == {}


def test_walk_gives_the_same_values_in_order(photo_batch: PhotoBatch) -> None:
    x = photo_batch(2, 32)
    program = captured(models.settle(models.cifar_resnet(8, seed=0), x))
    every = activations(program, [x])
    walked = [(name, torch.equal(value, every[name])) for name, value in walk(program, [x])]
    names = dict.fromkeys(name for name, _ in walked)  # a slice of all there is repeats a name
    assert list(names) == [node.name for node in program.graph.nodes]
    assert all(equal for _, equal in walked)


def test_walk_frees_what_is_no_longer_read(photo_batch: PhotoBatch) -> None:
    program = captured(models.cifar_resnet(20, seed=0))
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    for _, value in walk(program, [photo_batch(1, 32)]):
        alive = [ref for ref in (*alive, weakref.ref(value)) if ref() is not None]
        most = max(most, len(alive))
    del value
    gc.collect()
    assert most <= 5
    assert all(ref() is None for ref in alive)


def test_unknown_names_and_wrong_inputs_are_refused() -> None:
    program, x = captured(InPlace(), 4), torch.zeros(1, 3, 4, 4)
    with pytest.raises(InputError, match="no value named layer9"):
        activations(program, [x], names={"layer9"})
    with pytest.raises(InputError, match="takes 1 inputs, got 2"):
        activations(program, [x, x])


def test_it_knows_nothing_of_the_ir() -> None:
    """Only the names of the values: a misreading that both shared could not show."""
    tree = ast.parse(Path(fastres.parity.oracle.__file__).read_text())
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    ours = {name for name in found if name.startswith("fastres")}
    sizes_and_dtypes = {"fastres.graph.specs", "fastres.parity.other_dtypes"}
    assert ours == {"fastres.errors", "fastres.graph.capture"} | sizes_and_dtypes
