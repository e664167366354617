"""BatchNorm statistics of many layers, merged batch by batch in float64: one launch for all layers of a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastswa import backends

_ALIGNMENT = 256
"""Bytes at which each layer's statistics start in the scratch, where every BatchNorm kernel takes them."""

_WEIGHT, _MEAN, _MEAN_SQUARES, _VAR, _VAR_SQUARES, _WITHIN = range(6)


@dataclass(frozen=True)
class Channels:
    """What a layer's statistics look like.

    Args:
        count: channels.
        dtype: in which the layer hands over the statistics of a batch.
        device: where it does so.
    """

    count: int
    dtype: torch.dtype
    device: torch.device


class Moments:
    """Running moments of the statistics of several layers.

    A layer writes the statistics of a batch into its part of `batch_statistics`; `merge` takes them in.

    Args:
        layers: what each layer's statistics look like.
    """

    def __init__(self, layers: Sequence[Channels]) -> None:
        members: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, layer in enumerate(layers):
            members.setdefault((layer.device, layer.dtype), []).append(index)
        self._groups = [_Group(indices, [layers[index] for index in indices]) for indices in members.values()]
        self.batch_statistics: list[tuple[Tensor, Tensor]] = _in_order(self._groups, "views")
        """For each layer the mean and the unbiased variance of the batch, to be written."""
        self.counters: list[Tensor] = _in_order(self._groups, "counters")
        """For each layer a counter on its device, which a layer in a compiled graph may advance at each call."""

    def merge(self, batch: Mapping[int, tuple[float, int]]) -> None:
        """Take in the batch statistics of some layers.

        Args:
            batch: by layer, the weight of the batch and how many values a channel had. Other layers are left alone.
        """
        for group in self._groups:
            here = {place: batch[index] for place, index in enumerate(group.indices) if index in batch}
            if here:
                group.merge(*group.upload(here))

    def merge_called(self, weight: float) -> None:
        """Take in the batch statistics of the layers whose counter has advanced, all on their devices.

        Args:
            weight: of the batch.
        """
        for group in self._groups:
            called = (group.calls - group.merged).clamp_(max=1).double()
            group.merged.copy_(group.calls)
            group.merge(called * weight, called)

    def most_calls(self) -> int:
        """The most that a layer's counter has advanced since the last merge. Waits for the devices."""
        return max(int((group.calls - group.merged).max()) for group in self._groups)

    def calls(self) -> list[int]:
        """How far each layer's counter has advanced. Waits for the devices."""
        found = {i: n for group in self._groups for i, n in zip(group.indices, group.calls.tolist(), strict=True)}
        return [found[index] for index in range(len(found))]

    def results(self, pooled: bool) -> list[tuple[Tensor, Tensor]]:
        """The merged statistics.

        Args:
            pooled: the variance of all values together, where each batch was weighted by its number of values;
                otherwise the weighted mean of the batches' unbiased variances.

        Returns:
            For each layer mean and variance, float64.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for group in self._groups:
            moments = group.moments
            total = moments[_WEIGHT].clamp_min(torch.finfo(torch.float64).tiny)
            var = (moments[_WITHIN] + moments[_MEAN_SQUARES]) / total if pooled else moments[_VAR]
            found.update(
                zip(group.indices, zip(group.split(moments[_MEAN]), group.split(var), strict=True), strict=True)
            )
        return [found[index] for index in range(len(found))]

    def progress(self, batches: int) -> Tensor:
        r"""How sure the statistics are, computed on the device without a wait.

        .. math:: \max_c \max\left(\frac{SE(\mu_c)}{\sqrt{v_c}}, \frac{SE(v_c)}{v_c}\right), \qquad
            SE(x)^2 = \frac{S_x}{W (K - 1)}

        Args:
            batches: how many were merged, K.

        Returns:
            Two float64 numbers: the worst standard error of a channel, NaN for one batch, and whether a statistic was
            NaN or infinite, 0 or 1.
        """
        worst = [group.worst_standard_error(batches) for group in self._groups]
        spoilt = [group.nonfinite.max().double() for group in self._groups]
        device = worst[0].device
        return torch.stack([torch.stack([part.to(device) for part in parts]).max() for parts in (worst, spoilt)])

    def nonfinite(self) -> list[int]:
        """The layers of which a batch's statistics were NaN or infinite. Waits for the devices."""
        return sorted(
            group.indices[place] for group in self._groups for place, bad in enumerate(group.nonfinite.tolist()) if bad
        )

    def sums(self) -> Tensor:
        """All moments as plain sums, which add up over processes: one flat float64 tensor on the first device."""
        device = self._groups[0].moments.device
        return torch.cat([part.to(device) for group in self._groups for part in group.sums()])

    def load_sums(self, sums: Tensor) -> None:
        """Take the moments from sums.

        Args:
            sums: as `sums` gives them, added up over processes.
        """
        start = 0
        for group in self._groups:
            size = group.moments.numel() + group.nonfinite.numel()
            group.load_sums(sums[start : start + size].to(group.moments.device))
            start += size


class _Group:
    """The layers on one device that hand over their statistics in one dtype."""

    def __init__(self, indices: Sequence[int], layers: Sequence[Channels]) -> None:
        self.indices = list(indices)
        device, dtype = layers[0].device, layers[0].dtype
        step = _ALIGNMENT // dtype.itemsize
        padded = [-(-layer.count // step) * step for layer in layers]
        self._sizes = [layer.count for layer in layers]
        self._starts = [sum(padded[:place]) for place in range(len(padded))]
        channels = sum(padded)
        self._mean = torch.zeros(channels, dtype=dtype, device=device)
        self._var = torch.zeros(channels, dtype=dtype, device=device)
        self.views = list(zip(self.split(self._mean), self.split(self._var), strict=True))
        self.moments = torch.zeros(6, channels, dtype=torch.float64, device=device)
        self.nonfinite = torch.zeros(len(layers), dtype=torch.int32, device=device)
        self.calls = torch.zeros(len(layers), dtype=torch.int64, device=device)
        self.counters = list(self.calls.unbind())
        self.merged = torch.zeros_like(self.calls)
        # Padding counts as the layer before it: its statistics stay 0, which changes no maximum.
        places = torch.arange(len(layers), dtype=torch.int32, device="cpu")
        self._layer_of_channel = places.repeat_interleave(torch.tensor(padded, device="cpu")).to(device)
        self._uploaded: tuple[object, tuple[Tensor, Tensor]] = (None, (self.moments, self.moments))
        self._kernels = backends.batch_norm_kernels(device)

    def split(self, channels: Tensor) -> list[Tensor]:
        """Each layer's part of a row of channels."""
        return [channels[start : start + size] for start, size in zip(self._starts, self._sizes, strict=True)]

    def upload(self, batch: Mapping[int, tuple[float, int]]) -> tuple[Tensor, Tensor]:
        """Weights and counts on the device; nothing to do where they are those of the last batch."""
        if self._uploaded[0] != batch:
            host = torch.zeros(2, len(self.indices), dtype=torch.float64, device="cpu")
            for place, (weight, count) in batch.items():
                host[0, place], host[1, place] = weight, count
            if self.moments.is_cuda:
                host = host.pin_memory()
            weights, counts = host.to(self.moments.device, non_blocking=True)
            self._uploaded = (dict(batch), (weights, counts))
        return self._uploaded[1]

    def merge(self, weights: Tensor, counts: Tensor) -> None:
        """One launch."""
        self._kernels.merge_batch_stats_(
            self.moments, self._mean, self._var, weights, counts, self._layer_of_channel, self.nonfinite
        )

    def worst_standard_error(self, batches: int) -> Tensor:
        """Over the channels, for mean and variance."""
        weight, var = self.moments[_WEIGHT], self.moments[_VAR]
        worst = []
        for squares, scale in ((_MEAN_SQUARES, var.sqrt()), (_VAR_SQUARES, var)):
            error = (self.moments[squares] / (weight * (batches - 1))).sqrt()
            # A constant channel is known exactly; so is padding, and a layer that is never called has no error.
            worst.append(torch.where((self.moments[squares] == 0) & (batches > 1), 0, error / scale).max())
        return torch.stack(worst).max()

    def sums(self) -> Iterator[Tensor]:
        """Moments about zero, and the flags."""
        weight, mean, mean_squares, var, var_squares, within = self.moments
        yield from (weight, weight * mean, mean_squares + weight * mean**2)
        yield from (weight * var, var_squares + weight * var**2, within, self.nonfinite.double())

    def load_sums(self, sums: Tensor) -> None:
        """From sums of several processes."""
        self.nonfinite.copy_(sums[self.moments.numel() :] > 0)
        weight, mean, mean_squares, var, var_squares, within = sums[: self.moments.numel()].view_as(self.moments)
        total = weight.clamp_min(torch.finfo(torch.float64).tiny)
        mean, var = mean / total, var / total
        # Rounding may leave a little less than nothing.
        mean_squares = (mean_squares - weight * mean**2).clamp_min_(0)
        var_squares = (var_squares - weight * var**2).clamp_min_(0)
        self.moments.copy_(torch.stack([weight, mean, mean_squares, var, var_squares, within]))


def _in_order(groups: Sequence[_Group], attribute: str) -> list:  # type: ignore[type-arg]
    found = {
        index: value for group in groups for index, value in zip(group.indices, getattr(group, attribute), strict=True)
    }
    return [found[index] for index in range(len(found))]
