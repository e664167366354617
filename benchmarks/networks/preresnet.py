"""Pre-activation ResNets for 32x32 images, the networks of the SWA paper's experiments on CIFAR."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import relu

BOTTLENECK_DEPTH = 44
"""From this depth on the blocks are bottlenecks."""


class BasicBlock(nn.Module):
    """Two convolutions of 3x3 pixels, each after BatchNorm and ReLU, added to a shortcut.

    Args:
        inputs: channels that come in.
        channels: that go out.
        stride: of the first convolution and of the shortcut; where it or the channels change, the shortcut is a
            convolution.
    """

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = _shortcut(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(relu(self.norm1(x)))
        residual = self.conv2(relu(self.norm2(residual)))
        return residual + (x if self.shortcut is None else self.shortcut(x))


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 pixels, each after BatchNorm and ReLU, added to a shortcut.

    Args:
        inputs: channels that come in.
        channels: between the convolutions; four times as many go out.
        stride: of the 3x3 convolution and of the shortcut; where it or the channels change, the shortcut is a
            convolution.
    """

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.shortcut = _shortcut(inputs, 4 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(relu(self.norm1(x)))
        residual = self.conv2(relu(self.norm2(residual)))
        residual = self.conv3(relu(self.norm3(residual)))
        return residual + (x if self.shortcut is None else self.shortcut(x))


class PreResNet(nn.Module):
    """Three stages of residual blocks, at 32x32, 16x16 and 8x8 pixels.

    Args:
        depth: layers with weights on the longest path: 6 n + 2 with basic blocks, from `BOTTLENECK_DEPTH` on 9 n + 2
            with bottlenecks, n blocks a stage.
        classes: to tell apart.
        channels: of an image.

    Raises:
        ValueError: there is no such depth.

    Example:
        >>> PreResNet(20, classes=10)(torch.randn(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        He et al. 2016, Identity Mappings in Deep Residual Networks; blocks by depth, shortcuts from the block's raw
        input and the initialisation (normal, by the outgoing connections) as in the SWA paper's code.
    """

    def __init__(self, depth: int, classes: int = 100, channels: int = 3) -> None:
        super().__init__()
        block: type[BasicBlock | Bottleneck] = BasicBlock if depth < BOTTLENECK_DEPTH else Bottleneck
        layers = 6 if block is BasicBlock else 9
        blocks, rest = divmod(depth - 2, layers)
        if rest or not blocks:
            raise ValueError(
                f"depth {depth} is not {layers} n + 2, as a pre-activation ResNet's of {block.__name__} is"
            )
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.stage0 = _stage(block, blocks, 16, 16, stride=1)
        self.stage1 = _stage(block, blocks, 16 * block.expansion, 32, stride=2)
        self.stage2 = _stage(block, blocks, 32 * block.expansion, 64, stride=2)
        self.norm = nn.BatchNorm2d(64 * block.expansion)
        self.head = nn.Linear(64 * block.expansion, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stage0(self.stem(x))))
        scores: Tensor = self.head(relu(self.norm(x)).mean((2, 3)))
        return scores


PreResNet164 = partial(PreResNet, 164)
"""Three stages of 18 bottlenecks; 163 BatchNorm layers."""


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Conv2d | None:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 or inputs != outputs else None


def _stage(block: type[BasicBlock | Bottleneck], blocks: int, inputs: int, channels: int, stride: int) -> nn.Sequential:
    others = (block(block.expansion * channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(block(inputs, channels, stride), *others)
