"""VGG16 for 32x32 images, with and without BatchNorm."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions between two poolings: configuration D of the paper."""


class VGG16(nn.Module):
    """Thirteen convolutions of 3x3 pixels in five stages, each halved by pooling, and three linear layers.

    Args:
        classes: to tell apart.
        channels: of an image.
        batch_norm: whether a BatchNorm follows each convolution.

    Example:
        >>> VGG16(classes=10)(torch.randn(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        Simonyan and Zisserman 2015, Very Deep Convolutional Networks for Large-Scale Image Recognition, table 1, D.
        Linear layers of 512 with dropout before, and the initialisation of the convolutions (normal, by the outgoing
        connections), as in the SWA paper's code.
    """

    def __init__(self, classes: int = 100, channels: int = 3, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in STAGES:
            for outputs in stage:
                convolution = nn.Conv2d(channels, outputs, 3, padding=1)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(convolution.bias)
                layers += [convolution, *([nn.BatchNorm2d(outputs)] if batch_norm else []), nn.ReLU(inplace=True)]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            *(nn.Dropout(), nn.Linear(512, 512), nn.ReLU(inplace=True)),
            *(nn.Dropout(), nn.Linear(512, 512), nn.ReLU(inplace=True)),
            nn.Linear(512, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x).flatten(1))
        return scores
