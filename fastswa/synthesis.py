"""Post-hoc synthesis: a PowerEMA of any width, made after training from a few stored ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastswa.power_ema import PowerEMA, gamma_of
from fastswa.profiles import fit, nearest
from fastswa.weight_averages import WeightAverages


@dataclass(frozen=True)
class Snapshot:
    """A PowerEMA as it stood after some models.

    Args:
        n: models taken, at least 1.
        gamma: of the PowerEMA.
        weights: the average's tensors by name.
    """

    n: int
    gamma: float
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, averages: WeightAverages, name: str | None = None) -> Snapshot:
        """Take one of several averages as it stands.

        Args:
            averages: that hold it.
            name: of an average with the rule PowerEMA; may be left out where there is one.

        Returns:
            The snapshot, with tensors of its own.

        Raises:
            TypeError: another rule.
            KeyError, RuntimeError: as `WeightAverages.weights` has them.
        """
        weights = averages.weights(name)
        name = name or next(iter(averages.rules))
        rule = averages.rules[name]
        if not isinstance(rule, PowerEMA):
            raise TypeError(f"a snapshot is of a PowerEMA, but the rule of {name!r} is {rule!r}")
        return cls(averages.n_averaged[name], rule.gamma, weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `synthesize` takes.

        Args:
            path: of the file, written by torch.save.
        """
        torch.save({"n": self.n, "gamma": self.gamma, "weights": dict(self.weights)}, path)

    @classmethod
    def read(cls, state: Snapshot | Mapping[str, Any] | str | os.PathLike[str]) -> Snapshot:
        """Take a state as a Snapshot.

        Args:
            state: a Snapshot; a mapping with "n", "gamma" and "weights"; a file of such a mapping by torch.save, opened
                without reading the tensors; or a .safetensors file of the weights with "n" and "gamma" in its metadata.

        Returns:
            The snapshot.

        Raises:
            ValueError: an entry is missing; the file is named.
        """
        if isinstance(state, Snapshot):
            return state
        where = "the state"
        if not isinstance(state, Mapping):
            where = os.fspath(state)
            state = _open(Path(state))
        missing = [key for key in ("n", "gamma", "weights") if key not in state]
        if missing:
            raise ValueError(f"{where} has no {missing[0]!r}; a snapshot has 'n', 'gamma' and 'weights'")
        return cls(int(state["n"]), float(state["gamma"]), state["weights"])


def synthesize(
    snapshots: Sequence[Snapshot | Mapping[str, Any] | str | os.PathLike[str]],
    *,
    sigma_rel: float | None = None,
    gamma: float | None = None,
    step: int | None = None,
) -> dict[str, Tensor]:
    r"""The PowerEMA of a width that was not kept, from stored ones.

    .. math:: \hat a = \sum_j x_j a_j, \qquad x = \arg\min \Big\| \sum_j x_j c_j - c \Big\|_2, \quad \sum_j x_j = 1

    where :math:`c_j(i)` is the weight of model i in the stored average j, and c that in the average asked for. Two
    widths stored at several times are enough for widths between them and near them; `fastswa.profiles.fit` tells how
    close it comes.

    The weights c are those of the discrete recursion, not the continuous ones of the paper, which err by about
    gamma / n: so the fit is as exact for a few models as for many. The sum of 1, which the paper's code reaches by
    scaling afterwards, is a condition of the fit: what did not change in training is returned unchanged. Each stored
    tensor is read once and summed in float64. Integer and bool tensors come from the nearest snapshot.

    Args:
        snapshots: at least one; see `Snapshot.read` for their forms. Names, shapes and dtypes must agree.
        sigma_rel: of the average asked for, in (0, 0.2887]. Give either this or `gamma`.
        gamma: of the average asked for, at least 0.
        step: models after which it is asked for; the most that a snapshot has if left out.

    Returns:
        The tensors by name, in the snapshots' dtypes, on the device of the nearest snapshot.

    Raises:
        TypeError: gamma and sigma_rel both given, or none.
        ValueError: no snapshots; names, shapes or dtypes that differ, with the first at fault; n, step or gamma out of
            range; snapshots too alike to tell apart.

    Example:
        >>> steps = torch.arange(1.0, 5.0)
        >>> narrow, wide = torch.zeros(1), torch.zeros(1)
        >>> for n, value in enumerate(steps):
        ...     narrow += (value - narrow) * PowerEMA(gamma=3.0).copy_weights(n)[0]
        ...     wide += (value - wide) * PowerEMA(gamma=1.0).copy_weights(n)[0]
        >>> states = [{"n": 4, "gamma": 3.0, "weights": {"w": narrow}}, {"n": 4, "gamma": 1.0, "weights": {"w": wide}}]
        >>> synthesize(states, gamma=3.0)["w"].equal(narrow)
        True

    References:
        Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, section 3.2 and
        Algorithm 3.
    """
    stored = [Snapshot.read(state) for state in snapshots]
    target = gamma_of(gamma, sigma_rel)
    counts, gammas = [snapshot.n for snapshot in stored], [snapshot.gamma for snapshot in stored]
    step = max(counts, default=0) if step is None else step
    coefficients, _ = fit(counts, gammas, step, target)
    closest = stored[nearest(counts, gammas, step, target)]
    _check_alike(stored)
    result = {}
    with torch.no_grad():
        for name, tensor in closest.weights.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                result[name] = tensor.clone()
                continue
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            total = torch.zeros_like(tensor, dtype=wide)
            for snapshot, coefficient in zip(stored, coefficients, strict=True):
                # One with no share is not read: 0 times infinity would spoil the sum.
                if coefficient:
                    total.add_(snapshot.weights[name].to(total), alpha=coefficient)
            result[name] = total.to(tensor.dtype)
    return result


def _open(path: Path) -> Mapping[str, Any]:
    if path.suffix != ".safetensors":
        # Mapped, so that each tensor is read when its turn comes.
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state
    # Only needed here, so no dependency of the library.
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {**(file.metadata() or {}), "weights": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def _check_alike(stored: Sequence[Snapshot]) -> None:
    first = stored[0].weights
    for index, snapshot in enumerate(stored[1:], start=1):
        unequal = sorted(first.keys() ^ snapshot.weights.keys())
        if unequal:
            place = 0 if unequal[0] in first else index
            raise ValueError(f"only snapshot {place} of 0 and {index} has {unequal[0]!r}")
        for name, tensor in first.items():
            other = snapshot.weights[name]
            if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
                raise ValueError(
                    f"{name!r} is {tuple(tensor.shape)} {tensor.dtype} in snapshot 0 and {tuple(other.shape)} "
                    f"{other.dtype} in snapshot {index}"
                )
