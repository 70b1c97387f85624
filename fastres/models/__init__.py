"""Reference residual networks: those whose meaning every compiled engine is checked against."""

from fastres.models.blocks import (
    BasicBlock,
    BlockSpec,
    Bottleneck,
    PaddedShortcut,
    PreActBlock,
    Shortcut,
    Version,
)
from fastres.models.resnet import (
    PreActResNet,
    ResNet,
    cifar_resnet,
    preact_resnet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from fastres.models.settling import settle

__all__ = [
    "BasicBlock",
    "BlockSpec",
    "Bottleneck",
    "PaddedShortcut",
    "PreActBlock",
    "PreActResNet",
    "ResNet",
    "Shortcut",
    "Version",
    "cifar_resnet",
    "preact_resnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "settle",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
