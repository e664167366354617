"""What the update of averages computes, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import check_update, check_weight
from ..pairs import check_lerp, check_multi_lerp, dense_like, dense_view, distinct
from ..rounding import StochasticRounding, random_bits, round_stochastically


@torch.no_grad()
def lerp_(averages: Sequence[Tensor], sources: Sequence[Tensor], weight: float | Tensor) -> None:
    r"""Move each average towards its source, in place.

    .. math:: a \leftarrow a + w (p - a)

    The two-sided form is used (from ``a`` where ``|w| < 1/2``, from ``p`` elsewhere), so that a small ``w`` loses
    nothing of ``a`` and ``w = 1`` gives ``p`` exactly, also where ``a`` was NaN. Arithmetic is float32, or float64
    where either tensor is, with one rounding at the store.

    Args:
        averages: tensors of float32, bfloat16, float16 or float64; any shape and strides; written.
        sources: one for each average, of the same shape; any of those dtypes; read.
        weight: in [0, 1]: a float, or a 0-dimensional floating tensor.

    Raises:
        ValueError: lists of different length, shapes that differ, memory that overlaps, a weight outside [0, 1];
            nothing has been written.
        TypeError: a dtype that is not one of the four; nothing has been written.

    Example:
        >>> average = [torch.tensor([0.0, 4.0])]
        >>> lerp_(average, [torch.tensor([1.0, 8.0])], 0.25)
        >>> average
        [tensor([0.2500, 5.0000])]

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, Algorithm 1.
    """
    check_weight(weight)
    check_lerp(averages, sources)
    for index in distinct(averages, sources):
        averages[index].copy_(_blended(averages[index], sources[index], weight))


@torch.no_grad()
def multi_lerp_(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    *,
    rounding: StochasticRounding | None = None,
    skip: Tensor | None = None,
) -> None:
    r"""Move K averages of each source towards it, in place.

    .. math:: a_{ki} \leftarrow a_{ki} + w_k (p_i - a_{ki}) \quad (w_k \ne 0)

    Each as `lerp_` does it, but an average of weight 0 is left as it is, also where the source is NaN. Stochastic
    rounding numbers the elements through the list of sources: those of sources[i] follow those of sources[i - 1], in
    the order of addresses of averages[0][i]. Dtypes, launches and devices change no number.

    Args:
        averages: K lists of tensors of float32, bfloat16, float16 or float64; any shape and strides; written.
            averages[k][i] follows sources[i]; the K averages of one source have one dtype and device.
        sources: one for each average of a list, of the same shape; any of those dtypes; read.
        weights: K floats in [0, 1], or a floating tensor of shape (K,).
        rounding: of bfloat16 and float16 averages, which the arithmetic leaves in float32 until then; None rounds to
            the nearest.
        skip: a tensor of one element: where it isn't 0 (NaN is not), nothing is written.

    Raises:
        ValueError: lists of different length, shapes or dtypes that differ, memory that overlaps, weights of another
            number or outside [0, 1], a flag of more than one element; nothing has been written.
        TypeError: a dtype that is not one of the four, arguments of other types; nothing has been written.

    Example:
        >>> slow, fast = [torch.zeros(2)], [torch.zeros(2)]
        >>> multi_lerp_([slow, fast], [torch.tensor([1.0, 8.0])], [0.125, 0.5])
        >>> slow, fast
        ([tensor([0.1250, 1.0000])], [tensor([0.5000, 4.0000])])
        >>> average = [torch.ones(5, dtype=torch.bfloat16)]
        >>> rounding = StochasticRounding(seed=1, step=7)
        >>> multi_lerp_([average], [torch.full((5,), 2.0)], [2**-8], rounding=rounding)  # half a step
        >>> average
        [tensor([1.0000, 1.0000, 1.0078, 1.0000, 1.0078], dtype=torch.bfloat16)]

    References:
        Connolly, Higham and Mary 2021, Stochastic Rounding and Its Probabilistic Backward Error Analysis.
    """
    check_update(weights, len(averages), rounding, skip)
    check_multi_lerp(averages, sources)
    if skip is not None and bool(skip != 0):
        return
    kept = set(distinct(*averages, sources))
    first = 0
    for index, source in enumerate(sources):
        for k, tensors in enumerate(averages):
            average = tensors[index]
            if index in kept and weights[k] != 0:
                result = _blended(average, source, weights[k])
                if rounding is not None and average.dtype in (torch.bfloat16, torch.float16):
                    bits = dense_like(averages[0][index], torch.int32)
                    numbers = first, source.numel(), rounding.seed, rounding.step, k, average.device
                    _flat(bits).copy_(random_bits(*numbers))
                    result = round_stochastically(result.float(), average.dtype, bits)
                average.copy_(result)
        first += source.numel()


def _blended(average: Tensor, source: Tensor, weight: float | Tensor) -> Tensor:
    compute = torch.float64 if torch.float64 in (average.dtype, source.dtype) else torch.float32
    old = average.to(compute)
    new = source.to(average.device, compute)
    w = torch.as_tensor(weight, device=average.device, dtype=compute)
    blended = torch.where(w.abs() < 0.5, old + w * (new - old), new - (new - old) * (1 - w))
    return torch.where(w == 1, new, blended)


def _flat(dense: Tensor) -> Tensor:
    view = dense_view(dense)
    assert view is not None
    return view
