"""SWAG's memory: a mean, a variance and the latest deviations of tensors, and what of it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastswa import backends, shards
from fastswa.average_state import different_tensors
from fastswa.flat import ALIGNMENT
from fastswa.followed import Followed
from fastswa.rules import check_integer
from fastswa.updates import Moments


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in every row."""

    device: torch.device
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]


class MomentRows:
    """Rows of memory, each with room for all tensors: their mean, their variance, and a ring of deviations.

    Each row is one allocation on each device, so that a file holds the rows in use and no others.

    Args:
        followed: the tensors, with dense strides of whose order each row holds one; complex ones as pairs of reals.
        rank: deviations in the ring.
        dtype: of all rows.
        device: of all rows; None for each tensor's own.

    Raises:
        TypeError: a tensor that several processes hold together; names it.
    """

    def __init__(
        self, followed: Sequence[Followed], rank: int, dtype: torch.dtype, device: torch.device | None
    ) -> None:
        self._names = [each.name for each in followed]
        sharded = next((each.name for each in followed if shards.is_sharded(each.tensor)), None)
        if sharded is not None:
            raise TypeError(
                f"{sharded!r} is a DTensor, of which each process holds a part: samples would have the same noise in "
                "every part. SWAG follows whole tensors; exclude it, or follow a model that is not sharded"
            )
        self._places: list[_Place] = []
        # On a GPU every tensor starts on a cache line, so that every one qualifies for 128-bit access.
        step = ALIGNMENT // dtype.itemsize
        sizes: dict[torch.device, int] = {}
        for each in followed:
            tensor = real(each.tensor.detach())
            there = tensor.device if device is None else device
            strides = torch.empty_like(tensor, device="meta").stride()
            self._places.append(_Place(there, sizes.setdefault(there, 0), tensor.shape, strides))
            sizes[there] += -(-tensor.numel() // step) * step
        self._rows = [
            {there: torch.empty(size, dtype=dtype, device=there) for there, size in sizes.items()}
            for _ in range(2 + rank)
        ]
        # Saved before the first model, they are not what happened to stand in memory.
        for row in self._rows[:2]:
            for memory in row.values():
                memory.zero_()

    @property
    def devices(self) -> list[torch.device]:
        """Where each tensor's rows are."""
        return [place.device for place in self._places]

    @property
    def means(self) -> list[Tensor]:
        """The mean of each tensor."""
        return self._row(0)

    @property
    def variances(self) -> list[Tensor]:
        """The variance of each tensor."""
        return self._row(1)

    def deviations(self, count: int) -> list[list[Tensor]]:
        """The first deviations of the ring.

        Args:
            count: of deviations, at most the rank.

        Returns:
            For each of them one tensor of each.
        """
        return [self._row(2 + slot) for slot in range(count)]

    def update_from(self, sources: Sequence[Tensor], backend: str) -> Moments:
        """Prepare the update from tensors in their present memory.

        Args:
            sources: one for each tensor that is followed, in that order.
            backend: "auto", "triton" or "torch".

        Returns:
            The prepared update, which holds addresses: good until a source gets other memory.
        """
        # What is prepared serves later calls too, which may be outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            ring = self.deviations(len(self._rows) - 2)
            return backends.prepare_moments(self.means, self.variances, ring, list(map(real, sources)), backend)

    def sample_(
        self, targets: Sequence[Tensor], coefficients: Sequence[float], diagonal: float, seed: int, backend: str
    ) -> None:
        """Write a sample: the mean, the deviations by coefficients, and noise of the standard deviations.

        Args:
            targets: one real tensor for each that is followed, in that order; on any device.
            coefficients: one for each of the first deviations of the ring.
            diagonal: factor of the standard deviations.
            seed: of the noise.
            backend: "auto", "triton" or "torch".
        """
        columns = self.deviations(len(coefficients))
        moments = self.means, self.variances, columns
        backends.sample_(targets, *moments, coefficients, diagonal, seed=seed, step=0, backend=backend)
        torch.clear_autocast_cache()

    def mean_(self, targets: Sequence[Tensor]) -> None:
        """Write the mean.

        Args:
            targets: one real tensor for each that is followed, in that order; on any device.
        """
        torch._foreach_copy_(list(targets), self.means)
        # Autocast would go on with its converted copies of other weights until its context ends.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def take(self, before: MomentRows) -> None:
        """Go on with the values of rows that are on other devices.

        Args:
            before: rows of the same tensors.
        """
        for index in range(len(self._rows)):
            torch._foreach_copy_(self._row(index), before._row(index))

    def named(self, columns: int) -> dict[str, Any]:
        """The tensors in use, by name.

        Args:
            columns: deviations in use.

        Returns:
            The tensors themselves, in nested dicts and a list.
        """
        return {
            "mean": self._named(self.means),
            "variance": self._named(self.variances),
            "deviations": [self._named(column) for column in self.deviations(columns)],
        }

    @torch.no_grad()
    def load(self, own: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[int, int]:
        """Write saved tensors into these.

        Args:
            own: the present settings, "rank" among them, which must be the saved ones.
            saved: the settings, "calls", "n_averaged", and what `named` gave, on whatever device.

        Returns:
            The saved calls and models.

        Raises:
            ValueError: they differ in more than values; the first difference is named, and nothing was written.
        """
        different = self._difference(own, saved)
        if different:
            raise ValueError(f"the saved SWAG is another: {different}")
        here = self.named(len(saved["deviations"]))
        pairs = [(here[key], saved[key]) for key in ("mean", "variance")]
        for to, origin in (*pairs, *zip(here["deviations"], saved["deviations"], strict=True)):
            torch._foreach_copy_(list(to.values()), [origin[name] for name in to])
        return saved["calls"], saved["n_averaged"]

    def _difference(self, own: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
        keys = (*own, "calls", "n_averaged", "mean", "variance", "deviations")
        missing = next((key for key in keys if key not in saved), None)
        if missing is not None:
            return f"there is no {missing!r} in the file"
        for key, value in own.items():
            if saved[key] != value:
                return f"{key} is {saved[key]} in the file and {value} here"
        for key in ("calls", "n_averaged"):
            check_integer(key, saved[key], 0)
        columns, held = min(saved["n_averaged"], own["rank"]), len(saved["deviations"])
        if held != columns:
            return f"of {saved['n_averaged']} models there should be {columns} deviations in the file, not {held}"
        here = self.named(columns)
        parts = [(key, here[key], saved[key]) for key in ("mean", "variance")]
        for slot in range(columns):
            parts.append((f"deviation {slot}", here["deviations"][slot], saved["deviations"][slot]))
        return next((found for part in parts if (found := different_tensors(*part))), None)

    def _row(self, index: int) -> list[Tensor]:
        row = self._rows[index]
        return [row[place.device].as_strided(place.shape, place.strides, place.offset) for place in self._places]

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, tensors, strict=True))


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals in the same memory; any other as it is.

    Args:
        tensor: of any dtype.
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
