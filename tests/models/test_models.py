"""fastres.models: torchvision's networks and the paper's numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastres import models

PhotoBatch = Callable[[int, int], Tensor]

# Parameters as torchvision documents them.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}

# The paper's table 6 gives 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 M.
CIFAR_PARAMETERS = {
    20: 269_722,
    32: 464_154,
    44: 658_586,
    56: 853_018,
    110: 1_727_962,
    1202: 19_421_274,
}


def on_meta(factory: Callable[..., nn.Module], **options: object) -> nn.Module:
    """Shapes alone, without the time and memory that weights take."""
    with torch.device("meta"):
        return factory(**options)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def settled_pair(name: str, images: Tensor, **options: object) -> tuple[nn.Module, nn.Module]:
    """torchvision's network, settled, and ours with its weights."""
    theirs = models.settle(getattr(torchvision.models, name)(**options), images)
    ours = on_meta(getattr(models, name), **options)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return theirs, ours.eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_agrees_with_torchvision(name: str, photo_batch: PhotoBatch) -> None:
    x = photo_batch(2, 64)
    theirs, ours = settled_pair(name, x)
    assert torch.equal(logits(ours, x), logits(theirs, x))


@pytest.mark.parametrize("flags", [(False, False, True), (False, True, True), (True, False, True)])
def test_dilation_agrees_with_torchvision(
    flags: tuple[bool, bool, bool], photo_batch: PhotoBatch
) -> None:
    x = photo_batch(2, 64)
    theirs, ours = settled_pair("resnet50", x, replace_stride_with_dilation=flags)
    assert torch.equal(logits(ours, x), logits(theirs, x))


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameter_count(name: str, expected: int) -> None:
    assert count(on_meta(getattr(models, name))) == expected


@pytest.mark.parametrize(("depth", "expected"), CIFAR_PARAMETERS.items())
def test_cifar_parameter_count(depth: int, expected: int) -> None:
    model = on_meta(models.cifar_resnet, depth=depth)
    assert count(model) == expected
    weighted = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


def test_bottleneck_needs_a_seventeenth_of_the_weights() -> None:
    def convolutions(block: nn.Module) -> int:
        return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d))

    assert convolutions(models.BasicBlock(models.BlockSpec(256, 256))) == 1_179_648
    assert convolutions(models.Bottleneck(models.BlockSpec(256, 64))) == 69_632


@dataclass(frozen=True)
class Flow:
    """Where a network's feature maps go: layer name -> (channels, height = width)."""

    model: Callable[[], nn.Module]
    size: int
    maps: dict[str, tuple[int, int]]


def bottleneck_flow(sizes: tuple[int, int, int, int]) -> dict[str, tuple[int, int]]:
    stages = zip((256, 512, 1024, 2048), sizes, strict=True)
    return {"conv1": (64, 112), "maxpool": (64, 56)} | {
        f"layer{i}": stage for i, stage in enumerate(stages, start=1)
    }


FLOWS = {
    "resnet18": Flow(
        models.resnet18,
        224,
        {
            "conv1": (64, 112),
            "maxpool": (64, 56),
            "layer1": (64, 56),
            "layer2": (128, 28),
            "layer3": (256, 14),
            "layer4": (512, 7),
            "avgpool": (512, 1),
        },
    ),
    "resnet50": Flow(models.resnet50, 224, bottleneck_flow((56, 28, 14, 7))),
    "resnet50-v1": Flow(
        lambda: models.resnet50(version="v1"), 224, bottleneck_flow((56, 28, 14, 7))
    ),
    "resnet50-dilated": Flow(
        lambda: models.resnet50(replace_stride_with_dilation=(False, True, True)),
        224,
        bottleneck_flow((56, 28, 28, 28)),
    ),
    "resnet18-cifar": Flow(
        lambda: models.resnet18(stem="cifar", num_classes=10),
        32,
        {
            "conv1": (64, 32),
            "maxpool": (64, 32),
            "layer1": (64, 32),
            "layer2": (128, 16),
            "layer3": (256, 8),
            "layer4": (512, 4),
            "fc": (10, 0),
        },
    ),
    "cifar20": Flow(
        lambda: models.cifar_resnet(20),
        32,
        {"conv1": (16, 32), "layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)},
    ),
    "preact20": Flow(
        lambda: models.preact_resnet(20),
        32,
        {"conv1": (16, 32), "layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)},
    ),
}


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
def test_shape_flow(flow: Flow) -> None:
    model = on_meta(flow.model)
    seen: dict[str, tuple[int, ...]] = {}
    for name in flow.maps:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: tuple(output.shape)})
        )
    model(torch.empty(2, 3, flow.size, flow.size, device="meta"))
    expected = {n: (2, c, s, s) if s else (2, c) for n, (c, s) in flow.maps.items()}
    assert seen == expected


class TestVersion:
    @pytest.mark.parametrize(
        ("version", "stride1", "stride2"), [("v1", (2, 2), (1, 1)), ("v1.5", (1, 1), (2, 2))]
    )
    def test_stride_stands_in(
        self, version: str, stride1: tuple[int, int], stride2: tuple[int, int]
    ) -> None:
        model = on_meta(models.resnet50, version=version)
        for stage in ("layer2", "layer3", "layer4"):
            first, *rest = model.get_submodule(stage)
            assert first.conv1.stride == stride1
            assert first.conv2.stride == stride2
            assert first.conv3.stride == (1, 1)
            assert first.downsample[0].stride == (2, 2)
            assert all(b.conv1.stride == b.conv2.stride == (1, 1) for b in rest)

    @pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
    def test_weights_have_the_same_shapes(self, name: str) -> None:
        factory = getattr(models, name)
        assert shapes(on_meta(factory, version="v1")) == shapes(on_meta(factory, version="v1.5"))

    def test_v1_is_torchvision_with_the_stride_moved(self, photo_batch: PhotoBatch) -> None:
        x = photo_batch(2, 64)
        theirs, v15 = settled_pair("resnet50", x)
        v1 = on_meta(models.resnet50, version="v1").eval()
        v1.load_state_dict(theirs.state_dict(), strict=True, assign=True)
        before = logits(theirs, x)
        for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        moved = logits(theirs, x)
        assert torch.equal(logits(v1, x), moved)
        assert torch.equal(logits(v15, x), before)
        # A wrong guess loads without a word and answers wrongly.
        assert (moved - before).norm() > 0.1 * before.norm()


class TestShortcut:
    @staticmethod
    def kinds(model: nn.Module) -> list[str]:
        """One letter a block: i(dentity), p(rojection) or z(ero padding)."""
        letters = {type(None): "i", nn.Sequential: "p", models.PaddedShortcut: "z"}
        blocks = (models.BasicBlock, models.Bottleneck, models.PreActBlock)
        return [letters[type(m.downsample)] for m in model.modules() if isinstance(m, blocks)]

    @pytest.mark.parametrize(
        ("shortcut", "expected"), [("A", "iizizizi"), ("B", "iipipipi"), ("C", "pppppppp")]
    )
    def test_basic(self, shortcut: str, expected: str) -> None:
        # The first letter is layer1's first block, whose shape does not change.
        assert self.kinds(on_meta(models.resnet18, shortcut=shortcut)) == list(expected)

    @pytest.mark.parametrize(
        ("shortcut", "expected"),
        [("A", "ziiziiiziiiiizii"), ("B", "piipiiipiiiiipii"), ("C", "p" * 16)],
    )
    def test_bottleneck(self, shortcut: str, expected: str) -> None:
        assert self.kinds(on_meta(models.resnet50, shortcut=shortcut)) == list(expected)

    @pytest.mark.parametrize(
        ("shortcut", "expected"), [("A", "iiiziizii"), ("B", "iiipiipii"), ("C", "p" * 9)]
    )
    @pytest.mark.parametrize("factory", [models.cifar_resnet, models.preact_resnet])
    def test_three_stages(
        self, factory: Callable[..., nn.Module], shortcut: str, expected: str
    ) -> None:
        assert self.kinds(on_meta(factory, depth=20, shortcut=shortcut)) == list(expected)

    def test_a_subsamples_and_pads_both_sides(self) -> None:
        x = torch.randn(2, 16, 5, 7)
        y = models.PaddedShortcut(16, 32, 2)(x)
        assert y.shape == (2, 32, 3, 4)
        assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
        assert not y[:, :8].any() and not y[:, 24:].any()

    def test_a_has_no_parameters(self) -> None:
        assert not list(models.PaddedShortcut(16, 32, 2).parameters())
        padded, projected = (
            on_meta(models.cifar_resnet, depth=20, shortcut=shortcut) for shortcut in "AB"
        )
        # Two 1x1 projections, each with gamma and beta.
        assert count(projected) - count(padded) == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


class TestPreActivation:
    def test_block_normalises_before_it_convolves(self) -> None:
        block = models.settle(models.PreActBlock(models.BlockSpec(4, 4)), torch.randn(3, 4, 6, 6))
        x = torch.randn(2, 4, 6, 6)
        inner = torch.relu(block.bn2(block.conv1(torch.relu(block.bn1(x)))))
        assert torch.equal(block(x), block.conv2(inner) + x)

    def test_projection_reads_the_activated_input(self) -> None:
        spec = models.BlockSpec(4, 8, stride=2)
        block = models.settle(models.PreActBlock(spec), torch.randn(3, 4, 6, 6))
        nn.init.zeros_(block.conv2.weight)
        x = torch.randn(2, 4, 6, 6)
        assert torch.equal(block(x), block.downsample(torch.relu(block.bn1(x))))

    def test_projection_is_a_bare_convolution(self) -> None:
        padded, projected = (
            on_meta(models.preact_resnet, depth=20, shortcut=shortcut) for shortcut in "AB"
        )
        assert count(projected) - count(padded) == 16 * 32 + 32 * 64

    def test_has_6n_plus_2_layers_on_the_main_path(self) -> None:
        model = on_meta(models.preact_resnet, depth=110, shortcut="A")
        weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(weighted) == 110


class TestInitialisation:
    def test_is_he_normal_over_the_fan_out(self) -> None:
        model = models.resnext50_32x4d(seed=0)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                expected = (2 / fan_out) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
            elif isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all() and (module.bias == 0).all()

    def test_follows_the_seed(self) -> None:
        def weights(seed: int | None) -> list[Tensor]:
            return list(models.cifar_resnet(8, seed=seed).parameters())

        same = zip(weights(1), weights(1), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
        assert not torch.equal(weights(1)[0], weights(2)[0])
        assert not torch.equal(weights(None)[0], weights(None)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.resnet50(version="v2"), r"unknown version 'v2'; supported: v1, v1\.5"),
        (lambda: models.resnet18(shortcut="D"), "unknown shortcut 'D'; supported: A, B, C"),
        (lambda: models.resnet18(stem="deep"), "unknown stem 'deep'; supported: imagenet, cifar"),
        (lambda: models.resnet18(num_classes=0), "num_classes must be at least 1, got 0"),
        (
            lambda: models.resnet50(replace_stride_with_dilation=(True,)),
            r"replace_stride_with_dilation must be 3 flags, got \(True,\)",
        ),
        (
            lambda: models.resnet18(replace_stride_with_dilation=(False, False, True)),
            r"basic blocks support no dilation.*got .*\(False, False, True\)",
        ),
        (
            lambda: models.ResNet(models.BasicBlock, (2, 2, 2, 2), groups=2),
            "basic blocks support .*groups=1.*got .*groups=2",
        ),
        (
            lambda: models.ResNet(models.BasicBlock, (2, 2, 2, 2), width_per_group=128),
            "basic blocks support .*width_per_group=64; got .*width_per_group=128",
        ),
        (lambda: models.ResNet(models.BasicBlock, (2, 2)), r"3 or 4 counts .* got \(2, 2\)"),
        (lambda: models.ResNet(models.BasicBlock, (2, 0, 2)), r"at least 1, got \(2, 0, 2\)"),
        (lambda: models.cifar_resnet(18), r"depth must be 6n \+ 2 .*, got 18"),
        (lambda: models.cifar_resnet(2), r"depth must be 6n \+ 2 .*, got 2"),
        (lambda: models.cifar_resnet(20, version="1"), "unknown version '1'"),
        (lambda: models.preact_resnet(21), r"depth must be 6n \+ 2 .*, got 21"),
        (lambda: models.preact_resnet(20, shortcut="D"), "unknown shortcut 'D'"),
        (lambda: models.preact_resnet(20, num_classes=-1), "num_classes .* got -1"),
        (lambda: models.PreActResNet(0), "blocks must be at least 1, got 0"),
    ],
)
def test_refuses(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


class TestPhotographs:
    def test_are_real_and_normalised(self, photos: Tensor) -> None:
        assert photos.shape == (3, 3, 224, 224)
        assert photos.dtype == torch.float32 and photos.is_contiguous()
        # White and black lie within these bounds after normalisation.
        assert photos.min() >= -2.2 and photos.max() <= 2.7
        assert photos.std() > 0.8

    def test_batches_are_deterministic_and_distinct(self, photo_batch: PhotoBatch) -> None:
        eight = photo_batch(8, 32)
        assert eight.shape == (8, 3, 32, 32)
        assert torch.equal(photo_batch(3, 32), eight[:3])
        assert len({tuple(picture.flatten().tolist()) for picture in eight}) == 8
        assert photo_batch(0, 32).shape == (0, 3, 32, 32)
