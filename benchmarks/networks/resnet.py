"""ResNet-50 for 224x224 images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 pixels, each before BatchNorm, added to a shortcut.

    Args:
        inputs: channels that come in.
        channels: between the convolutions; four times as many go out.
        stride: of the 3x3 convolution (not of the first one, as in the paper) and of the shortcut.
        shortcut: whether the shortcut is a convolution with BatchNorm.
    """

    def __init__(self, inputs: int, channels: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        outputs = 4 * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if shortcut else None
        self.shortcut_norm = nn.BatchNorm2d(outputs) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        residual = relu(self.norm1(self.conv1(x)))
        residual = relu(self.norm2(self.conv2(residual)))
        residual = self.norm3(self.conv3(residual))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return relu(residual + x)


class ResNet50(nn.Module):
    """Four stages of 3, 4, 6 and 3 bottleneck blocks; 53 BatchNorm layers.

    Args:
        classes: to tell apart.

    References:
        He et al. 2016, Deep Residual Learning for Image Recognition, table 1; strides as in torchvision.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(64)
        self.stage0 = _stage(64, 64, stride=1, blocks=3)
        self.stage1 = _stage(256, 128, stride=2, blocks=4)
        self.stage2 = _stage(512, 256, stride=2, blocks=6)
        self.stage3 = _stage(1024, 512, stride=2, blocks=3)
        self.head = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool2d(relu(self.stem_norm(self.stem(x))), 3, stride=2, padding=1)
        x = self.stage3(self.stage2(self.stage1(self.stage0(x))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def _stage(inputs: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = Bottleneck(inputs, channels, stride, shortcut=True)
    others = (Bottleneck(4 * channels, channels, 1, shortcut=False) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)
