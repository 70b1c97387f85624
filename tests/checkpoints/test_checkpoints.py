"""fastres.checkpoints: the network is found wherever training left it, or the user is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

import fastres
from fastres import models
from fastres.checkpoints.reading import read_weights
from fastres.errors import BuildError
from fastres.graph.builder import ResNetSpec, build_graph

Table = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    return models.cifar_resnet(8, seed=seed)


@pytest.fixture(scope="module")
def table() -> Table:
    return dict(network().state_dict())


@pytest.fixture(scope="module")
def averaged() -> Table:
    return dict(network(1).state_dict())


def same(a: Any, b: Table) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def compiled(model: nn.Module) -> Any:
    """By no compiler, as some versions of PyTorch warn when the usual one is loaded."""
    return torch.compile(model, backend="eager")


def behind(prefix: str, table: Table) -> Table:
    return {prefix + name: tensor for name, tensor in table.items()}


def of_optimizer() -> dict[str, Any]:
    """With two tensors of moments for each weight, as large as the weights."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer.state_dict()


NESTS: dict[str, Callable[[Table], Any]] = {
    "bare": lambda t: t,
    "PyTorch's ImageNet example": lambda t: {
        "epoch": 90,
        "arch": "resnet18",
        "state_dict": behind("module.", t),
        "best_acc1": torch.tensor(76.1),
        "optimizer": of_optimizer(),
    },
    "PyTorch's tutorial": lambda t: {
        "epoch": 5,
        "model_state_dict": t,
        "optimizer_state_dict": of_optimizer(),
        "loss": torch.tensor(0.4),
    },
    "torchvision's reference": lambda t: {
        "model": t,
        "optimizer": of_optimizer(),
        "lr_scheduler": {"_last_lr": [0.1]},
        "scaler": {"scale": 65536.0},
    },
    "Lightning": lambda t: {
        "state_dict": behind("net.", t),
        "optimizer_states": [of_optimizer(), of_optimizer()],
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
    },
    "OpenMMLab": lambda t: {"meta": {"CLASSES": ("a",)}, "state_dict": behind("backbone.", t)},
    "DeepSpeed": lambda t: {"module": t, "param_shapes": [{k: v.shape for k, v in t.items()}]},
    "no such name": lambda t: {"net": t, "criterion": {"weight": torch.ones(10)}},
    "two deep": lambda t: {"state_dict": {"model": t}, "rng": [torch.get_rng_state()]},
    "in a list": lambda t: {"models": [t], "optimizers": [of_optimizer()]},
    "twice the same": lambda t: {"state_dict": t, "model": t, "state_dict_ema": {}, "ema": None},
    "only averaged": lambda t: {"model_ema": t | {"n_averaged": torch.tensor(5)}},
    "parameters": lambda t: {k: nn.Parameter(v, v.is_floating_point()) for k, v in t.items()},
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
@pytest.mark.parametrize("known", [True, False], ids=["names known", "to be built"])
@pytest.mark.parametrize("in_file", [True, False], ids=["file", "memory"])
def test_what_training_leaves(
    table: Table, nest: Callable[[Table], Any], known: bool, in_file: bool, tmp_path: Path
) -> None:
    content = nest(table)
    if in_file:
        torch.save(content, tmp_path / "net.ckpt")
        content = tmp_path / "net.ckpt"
    found = dict(read_weights(content, names=table.keys() if known else None))
    if "n_averaged" in found:  # in the table itself: whoever wants the weights tells
        del found["n_averaged"]
    assert same(found, table)


WRAPPED = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
    "model.",
    "backbone.",
    "net.",
    "model.backbone.",
    "model._orig_mod.backbone.module.",
    "student.encoder.",
    "layer1.",
]


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("known", [True, False], ids=["names known", "to be built"])
def test_prefixes_with_counters_beside(table: Table, prefix: str, known: bool) -> None:
    content = behind(prefix, table) | {
        "n_averaged": torch.tensor(7),
        "ema.initted": torch.tensor(True),
    }
    assert same(read_weights(content, names=table.keys() if known else None), table)


@pytest.mark.parametrize(
    "wrap",
    [
        DataParallel,
        AveragedModel,
        lambda m: AveragedModel(DataParallel(m)),
        compiled,
        lambda m: compiled(DataParallel(m)),
        lambda m: nn.ModuleDict({"model": DataParallel(compiled(m))}),
    ],
    ids=["DataParallel", "AveragedModel", "both", "compile", "compile both", "Lightning"],
)
def test_as_pytorch_wraps(table: Table, wrap: Callable[[nn.Module], nn.Module]) -> None:
    state = wrap(network()).state_dict()
    assert not set(table) & set(state)
    assert same(read_weights(state), table) and same(read_weights(state, names=table), table)


def test_wrappers_within_the_names(table: Table) -> None:
    model: Any = network()
    model.layer1 = compiled(model.layer1)
    model.layer2[0] = DataParallel(model.layer2[0])
    model.fc = compiled(DataParallel(model.fc))
    state = model.state_dict()
    assert {"layer1._orig_mod.0.conv1.weight", "fc._orig_mod.module.bias"} <= set(state)
    assert same(read_weights(state), table)
    assert same(read_weights(behind("model.", state), names=table), table)
    assert same(read_weights(table, names=state), state)  # and an engine of such a model


def test_a_model_whose_own_names_have_prefixes(table: Table) -> None:
    for prefix in ("model.", "backbone.", "module.", "_orig_mod."):
        own = behind(prefix, table) | {"head.weight": torch.ones(2, 2)}
        for content in (own, {"state_dict": own}, behind("module.", own), behind("net.", own)):
            assert same(read_weights(content, names=own), own)


def test_a_model_with_both_names() -> None:
    own = {"a.weight": torch.ones(2), "module.a.weight": torch.zeros(2), "b": torch.ones(1)}
    for content in (own, {"model": own}, behind("net.", own)):
        assert same(read_weights(content, names=own), own)


@pytest.mark.parametrize("scale", [2, 2.5])
def test_a_scalar_of_the_network_is_no_counter(table: Table, scale: float) -> None:
    own = table | {"scale": torch.tensor(scale)}
    assert same(read_weights(behind("module.", own), names=own), own)
    mixed = behind("module.", table) | {"scale": torch.tensor(scale)}
    assert same(read_weights(mixed, names=own), own)
    inside = behind("module.", table | {"layer1.0.scale": torch.tensor(scale)})
    for names in (None, table):
        assert "layer1.0.scale" in read_weights(inside, names=names)


def test_a_learnt_scalar_beside_the_network_is_not_dropped(table: Table) -> None:
    beside = {"temperature": torch.tensor(1.5)}
    with pytest.raises(BuildError, match="1 entries beside the network under 'model': temperature"):
        read_weights(behind("model.", table) | beside)
    assert "temperature" in read_weights(behind("module.", table) | beside)


RAW_AND_AVERAGED: dict[str, tuple[Callable[[Table, Table], Any], str, str]] = {
    "timm": (lambda r, a: {"state_dict": r, "state_dict_ema": a}, "state_dict", "state_dict_ema"),
    "torchvision": (
        lambda r, a: {
            "model": r,
            "model_ema": behind("module.", a) | {"n_averaged": torch.tensor(2)},
        },
        "model",
        "model_ema",
    ),
    "ema_state_dict": (
        lambda r, a: {"state_dict": r, "ema_state_dict": behind("module.", a)},
        "state_dict",
        "ema_state_dict",
    ),
    "ema": (lambda r, a: {"net": r, "ema": {"decay": 0.9, "shadow": a}}, "net", "ema.shadow"),
    "deeper": (
        lambda r, a: {"checkpoint": {"model": r, "ema": behind("model.", a)}},
        "checkpoint.model",
        "checkpoint.ema",
    ),
    "in one table": (
        lambda r, a: {"state_dict": behind("model.", r) | behind("ema_model.module.", a)},
        "state_dict.model",
        "state_dict.ema_model",
    ),
    "MoCo": (
        lambda r, a: {
            "state_dict": behind("module.encoder_q.", r)
            | behind("module.encoder_k.", a)
            | {"module.queue": torch.ones(4, 4)}
        },
        "state_dict.encoder_q",
        "state_dict.encoder_k",
    ),
    "DINO": (
        lambda r, a: {"student": behind("module.backbone.", r), "teacher": behind("backbone.", a)},
        "student",
        "teacher",
    ),
    "beside the bare names": (lambda r, a: r | behind("averaged.", a), "", "averaged"),
}


@pytest.mark.parametrize(
    ("nest", "first", "second"), RAW_AND_AVERAGED.values(), ids=RAW_AND_AVERAGED
)
@pytest.mark.parametrize("known", [True, False], ids=["names known", "to be built"])
def test_two_networks_are_a_question(
    table: Table,
    averaged: Table,
    nest: Callable[[Table, Table], Any],
    first: str,
    second: str,
    known: bool,
    tmp_path: Path,
) -> None:
    names = table.keys() if known else None
    torch.save(nest(table, averaged), tmp_path / "net.pth")
    if first or not known:  # a table that has all the names at the top is a state_dict
        with pytest.raises(BuildError) as asked:
            read_weights(tmp_path / "net.pth", names=names)
        assert f"2 places, {first}, {second}, such as raw and averaged" in str(asked.value)
        assert f"pass entry={first!r} or entry={second!r}" in str(asked.value)
    assert same(read_weights(tmp_path / "net.pth", names=names, entry=second), averaged)
    if first:
        assert same(read_weights(tmp_path / "net.pth", names=names, entry=first), table)


def test_an_entry_that_is_not_there(table: Table, averaged: Table) -> None:
    content = {"state_dict": table, "ema": averaged, "optimizer": of_optimizer()}
    for entry in ("best", "state", "optimizer", ""):
        with pytest.raises(
            BuildError, match=f"no such weights under {entry!r}; there are those of"
        ):
            read_weights(content, entry=entry)
    with pytest.raises(BuildError, match="entry is 3; give the name of an entry"):
        read_weights(content, entry=3)  # type: ignore[arg-type]


def test_weights_beside_the_network_are_not_dropped_unasked(table: Table) -> None:
    head = {"head.fc.weight": torch.ones(4, 4), "head.fc.bias": torch.ones(4)}
    content = {"state_dict": behind("backbone.", table) | head}
    for entry in (None, "state_dict"):
        with pytest.raises(BuildError, match="2 entries beside the network under .*: head.fc.weig"):
            read_weights(content, entry=entry)
    assert same(read_weights(content, entry="state_dict.backbone"), table)
    normalised = behind("model.", table) | {"mean": torch.ones(3)}
    with pytest.raises(BuildError, match="1 entries beside the network under 'model': mean"):
        read_weights(normalised, names=table)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"fc": {"weight": torch.ones(10, 64), "bias": torch.ones(10)}}, "fc"),
        ({"fc.weight": torch.ones(10, 64), "fc.bias": torch.ones(10)}, ""),
        ({"netD": {"0.weight": torch.ones(4, 4)}}, "netD"),
        ({"ema": {"decay": 0.9, "shadow_params": [torch.ones(4, 4)]}}, "ema.shadow_params"),
        ({"ema": {"layer10conv1weight": torch.ones(4, 4)}}, "ema"),
    ],
    ids=["head apart", "head loose", "discriminator", "averages without names", "other names"],
)
def test_weights_in_other_tables_are_not_dropped_unasked(
    table: Table, other: dict[str, Any], named: str
) -> None:
    with pytest.raises(BuildError, match=f"weights under '{named}' too, .*pass entry='backbone'"):
        read_weights({"backbone": table, **other})
    assert same(read_weights({"backbone": table, **other}, entry="backbone"), table)


def test_two_names_for_one_weight(table: Table) -> None:
    for twice in ("module.fc.bias", "_orig_mod.fc.bias"):
        with pytest.raises(BuildError, match=f"two weights for fc.bias, fc.bias and {twice}"):
            read_weights(table | {twice: torch.ones(10)})
    half = {k: t for k, t in table.items() if k != "bn1.bias"}
    with pytest.raises(BuildError, match=r"two weights for fc.bias"):
        read_weights(half | {"module.fc.bias": torch.ones(10)}, names=table)


def test_a_table_without_the_names_comes_as_it_is(table: Table) -> None:
    other = {"stem.weight": torch.ones(2, 2), "module.x": torch.ones(2)}
    content = {"state_dict": other, "loss": torch.tensor(0.1)}
    assert read_weights(content) is other and read_weights(content, names=table) is other
    with pytest.raises(BuildError, match="no conv1.weight among 2 weights"):
        fastres.build(content)


def test_tables_that_contain_themselves(table: Table) -> None:
    content: dict[str, Any] = {"model": table}
    content["self"] = content
    assert same(read_weights(content), table)
    deep: Any = {"model": table}
    for _ in range(5000):
        deep = {"next": deep}
    assert same(read_weights(deep), table)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.zeros(3), "Tensor"),
        ([torch.zeros(3)], "list"),
        (3, "int"),
        ({}, "nothing"),
        ({"state_dict": {}}, "state_dict"),
        ({"epoch": 3, "loss": 0.1}, "epoch, loss"),
    ],
)
def test_content_without_a_table(tmp_path: Path, content: Any, found: str) -> None:
    torch.save(content, tmp_path / "net.pth")
    said = f"holds {found}, where a table of tensors was expected: give model.state_dict"
    with pytest.raises(BuildError, match=f"net.pth {said}"):
        read_weights(tmp_path / "net.pth")
    if isinstance(content, dict):
        with pytest.raises(BuildError, match=f"the checkpoint {said}"):
            read_weights(content)


def test_a_whole_model_in_memory() -> None:
    with pytest.raises(BuildError, match=r"holds model, epoch, where .* give model.state_dict\(\)"):
        fastres.build({"model": network(), "epoch": 3})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"a": torch.zeros(3), "epoch": 3}, "epoch"),
        ({0: torch.zeros(3)}, "0"),
        ({"net": {"a": torch.zeros(3), "b": [1]}}, "b"),
        ({"net": {("a",): torch.zeros(3)}}, ""),
    ],
)
def test_files_with_entries_that_are_no_named_tensors(
    tmp_path: Path, content: Any, named: str
) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(BuildError, match=f"entries that are no named tensors: {named}"):
        read_weights(tmp_path / "net.pth")


def test_a_table_with_more_than_weights(tmp_path: Path, table: Table) -> None:
    torch.save({"state_dict": behind("module.", table | {"epoch": 3})}, tmp_path / "net.pth")  # type: ignore[dict-item]
    with pytest.raises(BuildError, match="entries that are no named tensors: epoch"):
        read_weights(tmp_path / "net.pth")


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "model."])
def test_build_from_files(tmp_path: Path, table: Table, prefix: str) -> None:
    want = build_graph(table, ResNetSpec())
    torch.save({"epoch": 3, "state_dict": behind(prefix, table)}, tmp_path / "net.pth.tar")
    safetensors.torch.save_file(behind(prefix, table), tmp_path / "net.safetensors")
    for path in tmp_path.iterdir():
        assert fastres.build(path).equals(want) and fastres.build(str(path)).equals(want)
    assert fastres.build({"model": behind(prefix, table)}).equals(want)


def test_build_asks_which(table: Table, averaged: Table) -> None:
    content = {"state_dict": table, "state_dict_ema": averaged}
    with pytest.raises(BuildError, match="state_dict, state_dict_ema, such as raw and averaged"):
        fastres.build(content)
    graph = fastres.build(content, entry="state_dict_ema")
    assert torch.equal(graph.constants["fc.weight"], averaged["fc.weight"])
