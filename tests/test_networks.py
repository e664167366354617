"""The networks of `python -m benchmarks train` are the published ones, and start as in the SWA paper's code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d, relu
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.cases import CASES
from benchmarks.networks import GPT2, TRAINED, PreResNet, WideResNet, build

# CIFAR-10, from the tables of github.com/osmr/imgclsmob, which count the same pre-activation ResNets.
PRERESNET20, PRERESNET164, PRERESNET272 = 272_282, 1_703_258, 2_816_090
# It has no depth of 110 with bottlenecks; each block beyond a stage's first adds the same, 6 of 12 fewer than 164 has.
PRERESNET110 = PRERESNET164 - (18 - 12) * (PRERESNET272 - PRERESNET164) // (30 - 18)
# Its wide ResNet has no biases: the stem's, and in each stage those of 8 convolutions and a shortcut.
WRN28X10 = 36_479_194 + 16 + 9 * (160 + 320 + 640)
# torchvision's documentation counts VGG16 for ImageNet; its linear layers give way to those of the SWA paper's code.
LINEAR = sum((inputs + 1) * outputs for inputs, outputs in ((512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)))
VGG16, VGG16BN = (count - LINEAR + 2 * 513 * 512 + 513 * 10 for count in (138_357_544, 138_365_992))

PUBLISHED = {
    "preresnet20": (PRERESNET20, 19),
    "preresnet110": (PRERESNET110, 109),
    "preresnet164": (PRERESNET164, 163),
    "vgg16": (VGG16, 0),
    "vgg16bn": (VGG16BN, 13),
    "wrn28x10": (WRN28X10, 25),
}
"""Parameters and BatchNorm layers: before each convolution but the stem, and at the end; in VGG after each."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_layers_and_scores(name: str) -> None:
    with torch.device("meta"):
        model, more_classes = build(name, classes=10, channels=3), build(name, classes=100, channels=3)
        scores = model(torch.empty(2, 3, 32, 32)), more_classes(torch.empty(2, 3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][0]
    assert sum(isinstance(module, _BatchNorm) for module in model.modules()) == PUBLISHED[name][1]
    assert [tuple(score.shape) for score in scores] == [(2, 10), (2, 100)]


def test_every_network_trains_one_channel_too() -> None:
    for name in TRAINED:
        with torch.device("meta"):
            size = 8 if name == "digits" else 32
            assert build(name, classes=7, channels=1)(torch.empty(2, 1, size, size)).shape == (2, 7)


def test_unknown_networks_and_depths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'resnet5'; known are digits, preresnet20"):
        build("resnet5", 10, 3)
    for depth, words in ((21, "6 n"), (45, "9 n"), (2, "6 n"), (112, "9 n")):
        with pytest.raises(ValueError, match=rf"depth {depth} is not {words} \+ 2"):
            PreResNet(depth)
    with pytest.raises(ValueError, match=r"depth 12 is not 6 n \+ 4"):
        WideResNet(12)


def normal(weight: torch.Tensor, deviation: float) -> None:
    """The values are normal with this deviation, as far as so many can tell: within five standard errors."""
    assert weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 5 * deviation / math.sqrt(weight.numel())
    # Of normal values 68.3 % lie within a deviation; of uniform ones 57.7 %.
    assert (weight.abs() < deviation).double().mean().item() == pytest.approx(
        0.683, abs=2.5 / math.sqrt(weight.numel())
    )


@pytest.mark.parametrize("name", ["preresnet20", "preresnet110", "vgg16bn"])
def test_convolutions_start_by_their_outgoing_connections(name: str) -> None:
    torch.manual_seed(0)
    for module in build(name, 10, 3).modules():
        if isinstance(module, nn.Conv2d):
            normal(module.weight, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
            assert module.bias is None or not module.bias.any()
        if isinstance(module, _BatchNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_a_wide_resnet_starts_as_torch_starts_it() -> None:
    model = WideResNet(10, 1, 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.kernel_size[0] ** 2 * module.in_channels)
            assert 0.8 * bound < module.weight.abs().max() <= bound
            assert module.bias.any()
    assert [module.momentum for module in model.modules() if isinstance(module, _BatchNorm)] == [*[0.1] * 6, 0.9]


def test_vgg_drops_half_before_each_linear_layer_but_the_last() -> None:
    kinds = [type(module) for module in build("vgg16", 10, 3).get_submodule("head").children()]
    assert kinds == [nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Linear]
    assert {module.p for module in build("vgg16", 10, 3).modules() if isinstance(module, nn.Dropout)} == {0.5}


def test_blocks_against_their_definition() -> None:
    """Pre-activation blocks, the shortcut taken from the raw input, the stride where the SWA paper's code has it."""
    torch.manual_seed(0)
    models = {"preresnet20": ("conv1", 2), "preresnet110": ("conv2", 3), "wide": ("conv2", 2)}
    for name, (strided, convolutions) in models.items():
        model = (WideResNet(16, 1) if name == "wide" else build(name, 10, 3)).double()
        for block in list(model.get_submodule("stage1").children())[:2]:
            images = torch.randn(3, block.norm1.num_features, 8, 8, dtype=torch.float64)
            expected = images
            for number in range(1, convolutions + 1):
                norm, conv = block.get_submodule(f"norm{number}"), block.get_submodule(f"conv{number}")
                nn.init.normal_(norm.bias)
                stride = 2 if f"conv{number}" == strided and block.shortcut is not None else 1
                activated = relu(batch_norm(expected, None, None, norm.weight, norm.bias, training=True))
                expected = conv2d(activated, conv.weight, conv.bias, stride, padding=conv.kernel_size[0] // 2)
            if block.shortcut is not None:
                expected = expected + conv2d(images, block.shortcut.weight, block.shortcut.bias, 2)
            else:
                expected = expected + images
            torch.testing.assert_close(block(images), expected)


def test_gpt2_has_the_published_tensors() -> None:
    with torch.device("meta"):
        model = GPT2()
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert shapes == sorted(shape for _, shape, _ in CASES["gpt2"]())


def test_gpt2_looks_back_only() -> None:
    torch.manual_seed(0)
    model = GPT2(layers=2, width=16, heads=2, vocabulary=30, context=8)
    tokens = torch.randint(30, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 30
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
