"""Which code runs on which device, and why not another: the only file that decides it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from fastswa.flat import FlatBuffers
from fastswa.prepared import torch_moments, torch_sets, torch_update, triton_moments, triton_sets, triton_update
from fastswa.staging import Several, Staged, StagedMoments
from fastswa.updates import Moments, MultiUpdate, Update

Backend = Literal["auto", "triton", "torch"]

_log = logging.getLogger("fastswa")


@cache
def say_once(message: str) -> None:
    """Log at DEBUG why a slower way was taken, the first time only.

    Args:
        message: the way and the reason.
    """
    _log.debug(message)


def choose(backend: str, device: torch.device) -> Literal["triton", "torch"]:
    """The code that updates averages on a device.

    Args:
        backend: "triton" and "torch" are obeyed; "auto" takes Triton on a GPU where it can run, else torch.
        device: where the averages are.

    Returns:
        "triton" or "torch".

    Raises:
        ValueError: a backend of another name.
        RuntimeError: "triton" was asked for by name and can't run; says why.

    Example:
        >>> choose("auto", torch.device("cpu"))
        'torch'
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return "torch"
    from fastswa_kernels import refusal

    reason = refusal(device)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend='triton' can't run here: {reason}; use backend='auto'")
    say_once(f"averages on {device} are updated by torch: {reason}")
    return "torch"


def prepare(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    copy_to: Sequence[Tensor],
    copy_from: Sequence[Tensor],
    backend: str,
    flat: FlatBuffers,
) -> Update:
    """Choose the code for each device that holds averages, and let it prepare.

    Args:
        averages: real floating tensors; written.
        sources: one for each average; any floating dtype, strides and device; read.
        copy_to: tensors of any dtype, to be overwritten.
        copy_from: one for each of `copy_to`; any dtype, strides and device.
        backend: as `choose` takes it.
        flat: the buffers in which `averages` and `copy_to` lie.

    Returns:
        The prepared update.

    Raises:
        ValueError: sources that overlap the averages in memory.
        RuntimeError: "triton" was asked for by name and can't run; says why.
    """
    updates: list[Update] = []
    for device in dict.fromkeys(tensor.device for tensor in (*averages, *copy_to)):
        lerps = [pair for pair in zip(averages, sources, strict=True) if pair[0].device == device]
        copies = [pair for pair in zip(copy_to, copy_from, strict=True) if pair[0].device == device]
        make = triton_update if choose(backend, device) == "triton" else torch_update
        updates.append(make(lerps, copies, flat))
    return updates[0] if len(updates) == 1 else Several(updates)


def prepare_sets(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    copy_to: Sequence[Tensor],
    copy_from: Sequence[Tensor],
    backend: str,
    flats: Sequence[FlatBuffers],
    flat_copies: FlatBuffers,
    numbers: Sequence[int],
) -> MultiUpdate:
    """Choose the code that updates several sets of averages, and let it prepare.

    Args:
        averages: sets of real floating tensors, all laid out alike; written.
        sources: one for each average of a set, on its device; any floating dtype and strides; read.
        copy_to: tensors of any dtype, to be overwritten.
        copy_from: one for each of `copy_to`, of its dtype; any strides and device.
        backend: as `choose` takes it.
        flats: the buffers in which each set lies.
        flat_copies: the buffers in which `copy_to` lies.
        numbers: of each source's first element, for random bits.

    Returns:
        The prepared update.

    Raises:
        ValueError: sources that overlap the averages in memory.
        RuntimeError: "triton" was asked for by name and can't run; says why.
    """
    updates: list[MultiUpdate] = []
    for device in dict.fromkeys(tensor.device for tensor in (*averages[0], *copy_to)):
        here = [index for index, average in enumerate(averages[0]) if average.device == device]
        copies = [pair for pair in zip(copy_to, copy_from, strict=True) if pair[0].device == device]
        own = [[each[index] for index in here] for each in averages]
        make = triton_sets if choose(backend, device) == "triton" else torch_sets
        read, first = [sources[index] for index in here], [numbers[index] for index in here]
        updates.append(make(own, read, copies, flats, flat_copies, first))
    return updates[0] if len(updates) == 1 else Several(updates)


@torch.no_grad()
def lerp_lists_(averages: Sequence[Tensor], sources: Sequence[Tensor], weight: float | Tensor) -> None:
    """Update lists that are known only for this call, as torch hands them to a `multi_avg_fn`.

    Args:
        averages: tensors of one dtype on one device, written. Integer tensors are copied, not averaged.
        sources: one for each average, on that device.
        weight: in [0, 1]: a float, or a 0-dimensional tensor on the device.
    """
    if not averages:
        return
    first = averages[0]
    if first.is_complex():
        averages, sources = list(map(torch.view_as_real, averages)), list(map(torch.view_as_real, sources))
    if not (first.is_floating_point() or first.is_complex()):
        torch._foreach_copy_(list(averages), list(sources))
    elif choose("auto", first.device) == "triton":
        from fastswa_kernels import lerp_

        lerp_(averages, sources, weight)
    else:
        from fastswa.torch_update import TorchUpdate

        TorchUpdate(averages, sources, (), (), None).lerp_(weight)


@torch.no_grad()
def combine_(
    targets: Sequence[Tensor],
    sources: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float] | Tensor,
    backend: str = "auto",
) -> None:
    """Make each target a weighted sum of its sources: `fastswa_kernels.reference.combine_`, on any device.

    Args:
        targets: real floating tensors on any devices; written.
        sources: N lists; sources[k][i] is of the shape of targets[i], on any device.
        coefficients: N finite floats, or a floating tensor of shape (N,).
        backend: as `choose` takes it.

    Raises:
        ValueError, TypeError: as the reference raises them, before anything is written.
        RuntimeError: "triton" was asked for by name and can't run; says why.
    """
    from fastswa_kernels.combine_arguments import check_combine

    here: dict[torch.device, list[int]] = {}
    for index in check_combine(targets, sources, coefficients):
        here.setdefault(targets[index].device, []).append(index)
    chosen = {device: choose(backend, device) for device in here}
    for device, indices in here.items():
        own, read = [targets[index] for index in indices], [[each[index] for index in indices] for each in sources]
        if chosen[device] == "triton":
            from fastswa_kernels import combine_ as fused

            fused(own, read, coefficients)
        else:
            from fastswa import torch_combine

            values = coefficients.tolist() if isinstance(coefficients, Tensor) else coefficients
            torch_combine.combine_(own, read, values)


def prepare_moments(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    deviations: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    backend: str = "auto",
) -> Moments:
    """Choose the code for each device that holds running moments, and let it prepare.

    Args:
        means: real floating tensors, dense in memory; written.
        variances: one for each mean, of its dtype, device and layout; written.
        deviations: the slots of a ring, lists like the variances; an update writes one of them or none.
        sources: one for each mean; any floating dtype, strides and device; read.
        backend: as `choose` takes it.

    Returns:
        The prepared update, which holds addresses: keep the tensors.

    Raises:
        ValueError, TypeError: as `fastswa_kernels.reference.moments_` raises them.
        RuntimeError: "triton" was asked for by name and can't run; says why.
    """
    from fastswa_kernels.moments_arguments import check_moments, named_slots

    check_moments(means, variances, sources, named_slots(deviations))
    staged, moments = Staged(), []
    for device in dict.fromkeys(mean.device for mean in means):
        here = [index for index, mean in enumerate(means) if mean.device == device]
        own_variances, *ring = [[tensors[index] for index in here] for tensors in (variances, *deviations)]
        make = triton_moments if choose(backend, device) == "triton" else torch_moments
        moments.append(make(staged, [(means[index], sources[index]) for index in here], own_variances, ring))
    return StagedMoments(staged, moments)


def sample_(
    targets: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    deviations: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float] | Tensor,
    diagonal: float,
    *,
    seed: int,
    step: int,
    backend: str = "auto",
) -> None:
    """Draw weights from their running moments: `fastswa_kernels.reference.sample_`, on any device.

    One code serves the whole list, whose elements are numbered through: Triton's if it can run wherever the means are.

    Args:
        targets: real floating tensors on any devices; written.
        means, variances, deviations, coefficients, diagonal, seed, step: as the reference takes them.
        backend: as `choose` takes it.

    Raises:
        ValueError, TypeError: as the reference raises them, before anything is written.
        RuntimeError: "triton" was asked for by name and can't run; says why.
    """
    from fastswa_kernels.moments_arguments import check_sample

    check_sample(targets, means, variances, deviations, coefficients, diagonal)
    chosen = {choose(backend, mean.device) for mean in means}
    if chosen == {"triton"}:
        from fastswa_kernels import sample_ as fused

        fused(targets, means, variances, deviations, coefficients, diagonal, seed=seed, step=step)
    else:
        from fastswa import torch_moments

        factors = coefficients.tolist() if isinstance(coefficients, Tensor) else coefficients
        torch_moments.sample_(targets, means, variances, deviations, factors, diagonal, seed, step)


def batch_norm_kernels(device: torch.device) -> ModuleType:
    """The code that takes and merges BatchNorm statistics on a device.

    Args:
        device: where the statistics are.

    Returns:
        A module with `merge_batch_stats_` and `batch_stats`: Triton's on a GPU where it can run, else torch's.
    """
    if choose("auto", device) == "triton":
        from fastswa_kernels import batch_norm

        return batch_norm
    from fastswa_kernels import reference

    return reference
