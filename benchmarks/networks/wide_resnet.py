"""Wide residual networks for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


class WideBlock(nn.Module):
    """Two convolutions of 3x3 pixels, each after BatchNorm and ReLU, added to a shortcut.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the second convolution and of the shortcut; where it or the channels change, the shortcut is a
            convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(relu(self.norm1(x)))
        residual = self.conv2(relu(self.norm2(residual)))
        return residual + (x if self.shortcut is None else self.shortcut(x))


class WideResNet(nn.Module):
    """Three stages of wide blocks, at 32x32, 16x16 and 8x8 pixels.

    Args:
        depth: convolutions on the longest path and one for each stage's shortcut: 6 n + 4, n blocks a stage.
        width: factor of the channels, 16, 32 and 64.
        classes: to tell apart.
        channels: of an image.

    Raises:
        ValueError: there is no such depth.

    Example:
        >>> WideResNet(depth=10, width=1, classes=10)(torch.randn(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        Zagoruyko and Komodakis 2016, Wide Residual Networks, table 1. As in the SWA paper's code: convolutions with a
        bias, the stride at a block's second one, the last BatchNorm's momentum of 0.9, and torch's own initialisation
        (that code defines another, and applies it nowhere).
    """

    def __init__(self, depth: int = 28, width: int = 10, classes: int = 100, channels: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or not blocks:
            raise ValueError(f"depth {depth} is not 6 n + 4, as a wide ResNet's is")
        self.stem = nn.Conv2d(channels, 16, 3, padding=1)
        self.stage0 = _stage(blocks, 16, 16 * width, stride=1)
        self.stage1 = _stage(blocks, 16 * width, 32 * width, stride=2)
        self.stage2 = _stage(blocks, 32 * width, 64 * width, stride=2)
        self.norm = nn.BatchNorm2d(64 * width, momentum=0.9)
        self.head = nn.Linear(64 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stage0(self.stem(x))))
        scores: Tensor = self.head(relu(self.norm(x)).mean((2, 3)))
        return scores


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        WideBlock(inputs, outputs, stride), *(WideBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    )
