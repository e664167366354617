"""What running moments may be kept of, and what may be drawn from them: checks of kernels and plain torch alike."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from .combine_arguments import check_coefficients
from .pairs import check_disjoint, check_floating, check_shapes, distinct


def check_moments(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    sources: Sequence[Tensor],
    deviations: Sequence[tuple[str, Sequence[Tensor]]],
) -> list[int]:
    """Refuse lists whose moments can't be kept right, before anything is written.

    Args:
        means: tensors to be written.
        variances: likewise; one for each mean, of its shape, dtype and device.
        sources: tensors to be read; one for each mean, of its shape.
        deviations: what messages call each list of deviations, and the list: one for each mean, like the variances.

    Returns:
        The indices that remain when tied tensors count once.

    Raises:
        ValueError: names the first tensor that differs in number or shape, whose dtype or device is not that of its
            mean, or whose memory overlaps another's.
        TypeError: names the first tensor that is not of a supported floating dtype.
    """
    check_shapes(means, sources, "means", "sources")
    check_floating("sources", sources, "moments_")
    written = [("means", means), ("variances", variances), *deviations]
    _check_like_means(means, written, "moments_")
    kept = distinct(*(tensors for _, tensors in written), sources)
    check_disjoint(
        [(f"{name}[{index}]", tensors[index]) for index in kept for name, tensors in written],
        [(f"sources[{index}]", sources[index]) for index in kept],
        "keep moments of the weights beside the weights themselves",
    )
    return kept


def check_sample(
    targets: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    deviations: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float] | Tensor,
    diagonal: float,
) -> list[int]:
    """Refuse what `sample_` can't do right, before anything is written.

    Args:
        targets: tensors to be written.
        means: tensors to be read; one for each target, of its shape.
        variances: likewise; of the dtype and device of the means.
        deviations: lists of such tensors.
        coefficients: one for each list of deviations; the values of a tensor are not read.
        diagonal: factor of the standard deviations.

    Returns:
        The indices that remain when tied tensors count once.

    Raises:
        ValueError: names the first tensor that differs in number or shape, whose dtype or device is not that of its
            mean, or whose memory overlaps a target's; coefficients of another number or not finite; a diagonal that
            is negative or not finite.
        TypeError: names the first tensor that is not of a supported floating dtype; numbers of another type.
    """
    check_coefficients(coefficients, len(deviations))
    if not isinstance(diagonal, Real):
        raise TypeError(f"diagonal must be a float, got {type(diagonal).__name__}")
    if not 0.0 <= float(diagonal) < float("inf"):
        raise ValueError(f"diagonal must be finite and not negative, got {diagonal}")
    check_shapes(targets, means, "targets", "means")
    check_floating("targets", targets, "sample_")
    read = [("means", means), ("variances", variances), *named_slots(deviations)]
    _check_like_means(means, read, "sample_")
    kept = distinct(targets, *(tensors for _, tensors in read))
    check_disjoint(
        [(f"targets[{index}]", targets[index]) for index in kept],
        [(f"{name}[{index}]", tensors[index]) for index in kept for name, tensors in read],
        "draw into the weights, not into the moments",
    )
    return kept


def check_slot(slot: int | None, slots: int) -> None:
    """Refuse a slot that the ring doesn't have, which would be memory that nobody owns.

    Args:
        slot: of the ring, or None.
        slots: how many it has.

    Raises:
        ValueError: no such slot.
        TypeError: not an int.
    """
    if slot is None:
        return
    if not isinstance(slot, int) or isinstance(slot, bool):
        raise TypeError(f"slot must be an int or None, got {type(slot).__name__}")
    if not 0 <= slot < slots:
        raise ValueError(f"slot must be None or from 0 to {slots - 1}, got {slot}" if slots else "there are no slots")


def named_slots(deviations: Sequence[Sequence[Tensor]]) -> list[tuple[str, Sequence[Tensor]]]:
    """What messages call the lists of a ring, with the lists."""
    return [(f"deviations[{k}]", tensors) for k, tensors in enumerate(deviations)]


def _check_like_means(means: Sequence[Tensor], lists: Sequence[tuple[str, Sequence[Tensor]]], function: str) -> None:
    for name, tensors in lists:
        check_shapes(tensors, means, name, "means")
        check_floating(name, tensors, function)
        for index, (tensor, mean) in enumerate(zip(tensors, means, strict=True)):
            if (tensor.dtype, tensor.device) != (mean.dtype, mean.device):
                raise ValueError(
                    f"{name}[{index}] is {tensor.dtype} on {tensor.device} but means[{index}] {mean.dtype} on "
                    f"{mean.device}; the moments of one source have one dtype and device"
                )
