"""How each code is prepared for the tensors of one device: what it reads in place, and what is copied before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastswa.flat import FlatBuffers
from fastswa.staging import Staged
from fastswa.updates import MultiUpdate, Update

Pairs = list[tuple[Tensor, Tensor]]
"""What is written, and what is read for it."""

TakeMoments = Callable[[float, int | None], None]
"""Takes one more model by a weight, its deviations into a slot or none."""


def triton_update(lerps: Pairs, copies: Pairs, flat: FlatBuffers) -> Update:
    """One average of each source, by one launch.

    Args:
        lerps: averages and their sources.
        copies: tensors to be overwritten, and by which.
        flat: not needed.

    Returns:
        The prepared update.
    """
    from fastswa_kernels import LerpTable

    staged, averages = Staged(), [to for to, _ in lerps]
    return staged.before(LerpTable(averages, *_readable(staged, lerps, copies)))


def torch_update(lerps: Pairs, copies: Pairs, flat: FlatBuffers) -> Update:
    """One average of each source, in plain torch.

    Args:
        lerps: averages and their sources.
        copies: tensors to be overwritten, and by which.
        flat: the buffers in which what is written lies.

    Returns:
        The prepared update.
    """
    from fastswa.torch_update import TorchUpdate

    staged, averages = Staged(), [to for to, _ in lerps]
    sources = staged.replace(lerps, _elsewhere, keep_dtype=True)
    return staged.before(TorchUpdate(averages, sources, *_columns(copies), flat))


def triton_sets(
    averages: list[list[Tensor]],
    sources: list[Tensor],
    copies: Pairs,
    _: object,
    __: object,
    numbers: Sequence[int],
) -> MultiUpdate:
    """Several averages of each source, by one launch.

    Args:
        averages: sets of tensors, laid out alike.
        sources: one for each average of a set.
        copies: tensors to be overwritten, and by which.
        numbers: of each source's first element, for random bits.

    Returns:
        The prepared update.
    """
    from fastswa.triton_multi_update import TritonMultiUpdate

    staged, lerps = Staged(), list(zip(averages[0], sources, strict=True))
    return staged.before(TritonMultiUpdate(averages, *_readable(staged, lerps, copies), numbers))


def torch_sets(
    averages: list[list[Tensor]],
    sources: list[Tensor],
    copies: Pairs,
    flats: Sequence[FlatBuffers],
    flat_copies: FlatBuffers,
    numbers: Sequence[int],
) -> MultiUpdate:
    """Several averages of each source, in plain torch.

    Args:
        averages: sets of tensors, laid out alike.
        sources: one for each average of a set.
        copies: tensors to be overwritten, and by which.
        flats: the buffers in which each set lies.
        flat_copies: the buffers in which the overwritten tensors lie.
        numbers: of each source's first element, for random bits.

    Returns:
        The prepared update.
    """
    from fastswa.torch_multi_update import TorchMultiUpdate

    staged, lerps = Staged(), list(zip(averages[0], sources, strict=True))
    sources = staged.replace(lerps, _elsewhere, keep_dtype=True)
    return staged.before(TorchMultiUpdate(averages, sources, *_columns(copies), flats, flat_copies, numbers))


def triton_moments(staged: Staged, pairs: Pairs, variances: list[Tensor], ring: list[list[Tensor]]) -> TakeMoments:
    """Running moments, by one launch.

    Args:
        staged: gets the copies that are needed before.
        pairs: means and their sources.
        variances: one for each mean, laid out like it.
        ring: lists of deviations, laid out alike.

    Returns:
        The prepared update, but for the copies.
    """
    from fastswa_kernels import MomentsTable

    sources, _, _ = _readable(staged, pairs, [])
    return MomentsTable([mean for mean, _ in pairs], variances, sources, ring).moments_


def torch_moments(staged: Staged, pairs: Pairs, variances: list[Tensor], ring: list[list[Tensor]]) -> TakeMoments:
    """Running moments, in plain torch.

    Args:
        staged: gets the copies that are needed before.
        pairs: means and their sources.
        variances: one for each mean.
        ring: lists of deviations.

    Returns:
        The prepared update, but for the copies.
    """
    from fastswa.torch_moments import TorchMoments

    sources = staged.replace(pairs, _elsewhere, keep_dtype=True)
    return TorchMoments([mean for mean, _ in pairs], variances, sources, ring).moments_


def _readable(staged: Staged, lerps: Pairs, copies: Pairs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What a table of addresses takes beside the averages: sources, targets of copies, their sources."""
    from fastswa_kernels.table import layout_refusal

    sources = staged.replace(lerps, lambda to, origin: layout_refusal(to, origin) is not None, keep_dtype=True)
    copy_from = staged.replace(
        copies, lambda to, origin: to.dtype != origin.dtype or layout_refusal(to, origin) is not None, keep_dtype=False
    )
    return sources, [to for to, _ in copies], copy_from


def _elsewhere(to: Tensor, origin: Tensor) -> bool:
    return to.device != origin.device


def _columns(pairs: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    return [to for to, _ in pairs], [origin for _, origin in pairs]
