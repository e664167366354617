"""What may be combined with what, and by which numbers: the checks shared by the kernel and by plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from .pairs import FLOAT_DTYPES, check_disjoint, check_shapes, distinct, same_layout


def check_combine(
    targets: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], coefficients: Sequence[float] | Tensor
) -> list[int]:
    """Refuse what `combine_` can't do right, before anything is written.

    Args:
        targets: the tensors to be written.
        sources: lists of the tensors to be read; one for each target in each list, of its shape.
        coefficients: one for each list; the values of a tensor are not read.

    Returns:
        The indices that remain when a tied target that is listed again, with the same sources, is left out.

    Raises:
        ValueError: no list of sources; names the first tensor that differs in number or shape, whose dtype or device is
            not that of its target's other sources, or whose memory overlaps another's; coefficients of another number,
            not finite, or in a tensor that is not floating.
        TypeError: names the first tensor that is not of a supported floating dtype; coefficients of another type.
    """
    if not sources:
        raise ValueError("no list of sources; give at least one")
    check_coefficients(coefficients, len(sources))
    for k, tensors in enumerate(sources):
        check_shapes(targets, tensors, "targets", f"sources[{k}]")
    for name, tensors in (("targets", targets), *((f"sources[{k}]", tensors) for k, tensors in enumerate(sources))):
        if not {tensor.dtype for tensor in tensors}.issubset(FLOAT_DTYPES):
            index = next(index for index, tensor in enumerate(tensors) if tensor.dtype not in FLOAT_DTYPES)
            raise TypeError(
                f"{name}[{index}] is {tensors[index].dtype}; combine_ takes float32, bfloat16, float16 and float64. "
                "View a complex tensor with torch.view_as_real, copy an integer tensor with copy_."
            )
    for k, tensors in enumerate(sources):
        for index, (tensor, first) in enumerate(zip(tensors, sources[0], strict=True)):
            if tensor.dtype is not first.dtype or tensor.device != first.device:
                raise ValueError(
                    f"sources[{k}][{index}] is {tensor.dtype} on {tensor.device} but sources[0][{index}] {first.dtype} "
                    f"on {first.device}; all sources of one target have one dtype and device"
                )
    written, read = [], []
    indices = distinct(targets, *sources)
    for index in indices:
        written.append((f"targets[{index}]", targets[index]))
        for k, tensors in enumerate(sources):
            if not same_memory(targets[index], tensors[index]):
                read.append((f"sources[{k}][{index}]", tensors[index]))
    check_disjoint(written, read, "a target may be one of its own sources, and share no other memory")
    return indices


def same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape are the same elements in the same order.

    Args:
        first: any tensor.
        second: a tensor of the same shape.

    Returns:
        True where both have one address, dtype and layout.

    Example:
        >>> weight = torch.zeros(3, 3)
        >>> same_memory(weight, weight.view(3, 3)), same_memory(weight, weight.t())
        (True, False)
    """
    return first.data_ptr() == second.data_ptr() and first.dtype == second.dtype and same_layout(first, second)


def check_coefficients(coefficients: Sequence[float] | Tensor, count: int) -> None:
    """Refuse numbers that are no coefficients of a sum.

    Args:
        coefficients: numbers, or a tensor of one dimension, whose values are not read.
        count: of the sum's terms.

    Raises:
        ValueError: another number of them, one that is not finite, a tensor that is not floating.
        TypeError: anything else.
    """
    expected = f"coefficients must be {count} finite floats or a floating tensor of shape ({count},)"
    if isinstance(coefficients, Tensor):
        if coefficients.shape != (count,) or not coefficients.is_floating_point():
            raise ValueError(f"{expected}, got {coefficients.dtype} of shape {tuple(coefficients.shape)}")
    elif not isinstance(coefficients, Sequence) or not all(isinstance(value, Real) for value in coefficients):
        raise TypeError(f"{expected}, got {coefficients!r}")
    elif len(coefficients) != count or not all(math.isfinite(value) for value in coefficients):
        raise ValueError(f"{expected}, got {coefficients!r}")
