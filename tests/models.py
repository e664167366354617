"""Small models for the tests, and training steps that change every tensor of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolutions (one channels_last), BatchNorm with integer counters, a large and an empty tensor, a frozen one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, bias=False).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width * 36, 300)
        self.head_norm = nn.BatchNorm1d(300)
        self.head = nn.Linear(300, 3)
        self.head.bias.requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("mask", torch.ones(5, dtype=torch.bool))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(1)
        return self.head(self.head_norm(self.hidden(x)).relu())


class TiedNet(nn.Module):
    """A token embedding that is also the output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).relu())


class ComplexNet(nn.Module):
    """Complex parameters beside a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))
        self.second = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.third = nn.Parameter(torch.randn(7, dtype=torch.complex64))
        self.gain = nn.Parameter(torch.randn(5))
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex128))


@torch.no_grad()
def train_step(model: nn.Module) -> None:
    """Change every parameter and buffer, in place, as an optimizer and a forward pass would."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.bool:
            tensor.copy_(torch.rand(tensor.shape) < 0.5)
        elif tensor.is_floating_point() or tensor.is_complex():
            tensor.add_(torch.randn_like(tensor) * 0.1)
        else:
            tensor.add_(1)


def assert_same_average(ours: nn.Module, theirs: nn.Module, steps: int = 10) -> None:
    """Equal within the roundings of some steps, at least of float32: 4 of torch's and 2 of ours, on values below 8."""
    for (name, tensor), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        tolerance = 6 * steps * 8 * max(2**-23, torch.finfo(other.dtype).eps) if other.is_floating_point() else 0
        assert torch.allclose(tensor, other.to(tensor.dtype), rtol=0, atol=tolerance), name


def update_both(model: nn.Module, *averages: nn.Module, steps: int = 2) -> None:
    for _ in range(steps):
        train_step(model)
        for average in averages:
            average.update_parameters(model)
