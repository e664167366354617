"""Networks with BatchNorm, their data, and what must be as before after a failed pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Net(nn.Module):
    """BatchNorm of both ranks, one without statistics, one frozen, one called twice, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.shared = nn.BatchNorm2d(6, momentum=None)
        self.plain = nn.BatchNorm2d(6, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(6, momentum=0.3)
        self.frozen.eval()
        self.instance = nn.InstanceNorm2d(6, track_running_stats=True)
        self.drop = nn.Dropout(0.2)
        self.head_norm = nn.BatchNorm1d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.norm(self.conv(x)).relu())
        x = self.frozen(self.plain(self.shared(x)))
        return self.head_norm(self.drop(self.instance(x)).mean((2, 3)))


class Residual(nn.Module):
    """Pre-activation residual blocks and a head of rank 1, without randomness; four layers in depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head_norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(norm(x).relu())
        return self.head_norm(x.mean((2, 3)))


class Volumes(nn.Sequential):
    """BatchNorm3d."""

    def __init__(self) -> None:
        super().__init__(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(2), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1))


class Perceptron(nn.Sequential):
    """BatchNorm1d with a momentum of 0, which must not hold the statistics back."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(25, 8), nn.BatchNorm1d(8, momentum=0.0), nn.ReLU(), nn.BatchNorm1d(8))


NETWORKS = (Net, Residual, Volumes, Perceptron)


def batches(count: int = 5, last: int = 3) -> list[Tensor]:
    """Images whose level drifts from batch to batch, the last batch short."""
    sizes = [8] * (count - 1) + [last]
    return [torch.randn(size, 1, 5, 5) * (3 + number / 4) + 2 + number / 2 for number, size in enumerate(sizes)]


def trained(net: nn.Module) -> nn.Module:
    """A network whose statistics are not the initial ones."""
    for _ in range(3):
        net(torch.randn(8, 1, 5, 5))
    return net


def breaking(error: BaseException, after: int = 0) -> Iterator[Tensor]:
    """A loader that raises."""
    yield from batches(after + 1)[:after]
    raise error


def state(model: nn.Module) -> dict[str, object]:
    """Everything that a failed pass must leave as it was."""
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "addresses": [tensor.data_ptr() for tensor in model.buffers()],
        "modes": [module.training for module in model.modules()],
        "momenta": [getattr(module, "momentum", None) for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, object], values: bool = True) -> None:
    """Compare with an earlier `state`; of a successful pass the values may differ."""
    now = state(model)
    if values:
        old = before["values"]
        assert all(torch.equal(tensor, old[name]) for name, tensor in now["values"].items())  # type: ignore[index, union-attr]
    for key in ("identities", "addresses", "modes", "momenta", "hooks"):
        assert now[key] == before[key], key


def norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers with statistics, in order."""
    return [part for part in model.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def assert_buffers_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """Every buffer bit for bit."""
    for (name, tensor), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(tensor, other), name


def assert_statistics_close(ours: nn.Module, expected: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> None:
    """Means in standard deviations and variances in variances."""
    layers = norms(ours)
    assert len(layers) == len(expected)
    for layer, (mean, var) in zip(layers, expected, strict=True):
        mean_error = ((layer.running_mean.double() - mean).abs() / var.sqrt()).max()
        var_error = ((layer.running_var.double() - var).abs() / var).max()
        assert max(mean_error, var_error) <= tolerance, (mean_error, var_error)


def statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of each layer, in float64."""
    return [(layer.running_mean.double(), layer.running_var.double()) for layer in norms(model)]
