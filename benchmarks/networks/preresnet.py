"""Pre-activation ResNet-164 for 32x32 images, the network of the SWA paper's experiments on CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 pixels, each after BatchNorm and ReLU, added to a shortcut.

    Args:
        inputs: channels that come in.
        channels: between the convolutions; four times as many go out.
        stride: of the 3x3 convolution and of the shortcut.
        shortcut: whether the shortcut is a convolution.
    """

    def __init__(self, inputs: int, channels: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, 4 * channels, 1, stride, bias=False) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(relu(self.norm1(x)))
        residual = self.conv2(relu(self.norm2(residual)))
        residual = self.conv3(relu(self.norm3(residual)))
        return residual + (x if self.shortcut is None else self.shortcut(x))


class PreResNet164(nn.Module):
    """Three stages of 18 bottleneck blocks, at 32x32, 16x16 and 8x8 pixels; 163 BatchNorm layers.

    Args:
        classes: to tell apart.

    References:
        He et al. 2016, Identity Mappings in Deep Residual Networks; the shortcuts as in the SWA paper's code.
    """

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stage0 = _stage(16, 16, stride=1)
        self.stage1 = _stage(64, 32, stride=2)
        self.stage2 = _stage(128, 64, stride=2)
        self.norm = nn.BatchNorm2d(256)
        self.head = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stage0(self.stem(x))))
        scores: Tensor = self.head(relu(self.norm(x)).mean((2, 3)))
        return scores


def _stage(inputs: int, channels: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, channels, stride, shortcut=True)
    return nn.Sequential(first, *(Bottleneck(4 * channels, channels, 1, shortcut=False) for _ in range(17)))
