"""A pre-activation ResNet for 8x8 digits: the network that the demo trains."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


class PreActivationBlock(nn.Module):
    """Two convolutions, each after BatchNorm and ReLU, added to a shortcut.

    Args:
        inputs: channels that come in.
        outputs: channels that go out; where they differ, the shortcut is a convolution.
        stride: of the first convolution and of the shortcut.

    References:
        He et al. 2016, Identity Mappings in Deep Residual Networks, figure 1 (b).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = relu(self.norm1(x))
        residual: Tensor = self.conv2(relu(self.norm2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class PreActivationResNet(nn.Module):
    """A pre-activation ResNet for 8x8 images, in three stages of 8x8, 4x4 and 2x2 pixels.

    Args:
        width: channels of the first stage; doubled by each further one.
        blocks: in each stage.
        classes: to tell apart.
        channels: of an image.

    Example:
        >>> PreActivationResNet()(torch.randn(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, width: int = 8, blocks: int = 2, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        channels = width
        for stage in range(3):
            for block in range(blocks):
                outputs = width * 2**stage
                layers.append(PreActivationBlock(channels, outputs, stride=2 if stage and not block else 1))
                channels = outputs
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x).mean((2, 3)))
        return scores
