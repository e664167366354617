"""What running moments and samples of a normal distribution with them compute, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import check_weight
from ..moments_arguments import check_moments, check_sample
from ..normal import normal
from ..pairs import dense_like, dense_view


@torch.no_grad()
def moments_(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    sources: Sequence[Tensor],
    weight: float | Tensor,
    deviations: Sequence[Tensor] | None = None,
) -> None:
    r"""Take one more model into running means and variances, in place, and note how far it is from the new mean.

    .. math::
        d = p - \mu, \qquad \mu \leftarrow \mu + w d, \qquad
        \sigma^2 \leftarrow (1 - w)(\sigma^2 + w d^2), \qquad \delta \leftarrow p - \mu = (1 - w)\, d

    With :math:`w = 1/n` for the n-th model, :math:`\sigma^2` is the biased variance of the n models, the sum of squares
    divided by n; with a constant :math:`w` it is that of the exponential average. A mean of squares minus the squared
    mean is the same number on paper, and in float32 loses any variance below 1e-7 of the squared mean: of the variance
    of 200 weights of mean 1 and standard deviation 1e-4 that difference is wrong by 56 times the variance itself (root
    mean square of 20000 trials), this recurrence by 2e-4 of it.

    The mean moves as `lerp_` moves it. Arithmetic is float32, or float64 where either dtype is, with one rounding at
    each store; :math:`\delta` is computed as :math:`(1 - w)\, d`, which loses nothing to the rounding of the mean.
    :math:`w = 1` gives :math:`\mu = p`, :math:`\sigma^2 = 0`, :math:`\delta = 0` exactly, even where NaN stood.
    In float16 a squared distance below 6e-8 is 0: moments are best kept in float32.

    Args:
        means: tensors of float32, bfloat16, float16 or float64; any shape and strides; written.
        variances: one for each mean, of its shape, dtype and device; not negative; written.
        sources: one for each mean, of its shape; any of those dtypes, strides and devices; read.
        weight: in [0, 1]: a float, or a 0-dimensional floating tensor.
        deviations: one for each mean, of its shape, dtype and device; overwritten. None where they are not wanted.

    Raises:
        ValueError: lists of different length, shapes, dtypes or devices that differ, memory that overlaps, a weight
            outside [0, 1]; nothing has been written.
        TypeError: a dtype that is not one of the four; nothing has been written.

    Example:
        >>> mean, variance, deviation = [[torch.empty(1)] for _ in range(3)]
        >>> for n, weight in enumerate((1.0, 5.0), 1):
        ...     moments_(mean, variance, [torch.tensor([weight])], 1 / n, deviation)
        >>> mean, variance, deviation
        ([tensor([3.])], [tensor([4.])], [tensor([2.])])

    References:
        West 1979, Updating Mean and Variance Estimates: An Improved Method.
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning, Algorithm 1.
    """
    check_weight(weight)
    named = [] if deviations is None else [("deviations", deviations)]
    for index in check_moments(means, variances, sources, named):
        mean, variance, source = means[index], variances[index], sources[index]
        compute = torch.float64 if torch.float64 in (mean.dtype, source.dtype) else torch.float32
        old = mean.to(compute)
        new = source.to(mean.device, compute)
        w = torch.as_tensor(weight, device=mean.device, dtype=compute)
        distance = new - old
        moved = torch.where(w < 0.5, old + w * distance, new - distance * (1 - w))
        spread = (1 - w) * (variance.to(compute) + w * distance * distance)
        mean.copy_(torch.where(w == 1, new, moved))
        variance.copy_(torch.where(w == 1, 0, spread))
        if deviations is not None:
            deviations[index].copy_(torch.where(w == 1, 0, (1 - w) * distance))


@torch.no_grad()
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
) -> None:
    r"""Draw from a normal distribution whose covariance is a diagonal and a matrix of low rank.

    .. math:: t_i \leftarrow \mu_i + s\, \sigma_i z_i + \sum_{k:\, c_k \ne 0} c_k \delta_{ki}

    :math:`z` is standard normal and depends on the seed, the step and the element's number through the list alone
    (`normal.py`): the elements of means[i] follow those of means[i - 1], in the order of their addresses. Dtypes,
    layouts of the targets, launches and devices change no number beyond the last bits of a logarithm and a sine. With
    coefficients that are drawn by the caller, normal as well, the targets have the covariance
    :math:`s^2 \mathrm{diag}(\sigma^2) + E[c_k^2] \sum_k \delta_k \delta_k^\top`; it is never formed.

    Arithmetic is float32, or float64 where the target or the mean is, with one rounding at the store; what is added to
    the mean is summed first. :math:`z` has the precision of float32.

    Args:
        targets: tensors of float32, bfloat16, float16 or float64; any shape, strides and device; written.
        means: one for each target, of its shape; any of those dtypes; read.
        variances: one for each mean, of its dtype and device; not negative; read only where `diagonal` is not 0.
        deviations: K >= 0 lists of tensors like the means; a list of coefficient 0 is not read.
        coefficients: K finite floats, or a floating tensor of shape (K,), read by the host.
        diagonal: factor s >= 0 of the standard deviations; 0 draws no numbers.
        seed: any integer, modulo 2^64.
        step: likewise; each has numbers of its own.

    Raises:
        ValueError: lists of different length, shapes, dtypes or devices that differ, targets that overlap what is read,
            coefficients of another number or not finite, a negative diagonal; nothing has been written.
        TypeError: a dtype that is not one of the four, numbers of another type; nothing has been written.

    Example:
        >>> target, mean, variance = [torch.empty(3)], [torch.zeros(3)], [torch.tensor([0.0, 1.0, 4.0])]
        >>> sample_(target, mean, variance, [[torch.ones(3)]], [10.0], 1.0, seed=1, step=7)
        >>> target
        [tensor([10.0000, 10.6618,  6.2688])]

    References:
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning, section 3.2.
    """
    kept = set(check_sample(targets, means, variances, deviations, coefficients, diagonal))
    factors = coefficients.tolist() if isinstance(coefficients, Tensor) else coefficients
    first = 0
    for index, (target, mean) in enumerate(zip(targets, means, strict=True)):
        if index in kept:
            compute = torch.float64 if torch.float64 in (target.dtype, mean.dtype) else torch.float32
            added = torch.zeros_like(mean, dtype=compute)
            if diagonal:
                numbers = dense_like(mean, torch.float32)
                flat = dense_view(numbers)
                assert flat is not None
                flat.copy_(normal(first, mean.numel(), seed, step, mean.device))
                added += float(diagonal) * variances[index].to(compute).sqrt() * numbers.to(compute)
            for tensors, factor in zip(deviations, factors, strict=True):
                if factor != 0:
                    added += float(factor) * tensors[index].to(compute)
            target.copy_(mean.to(compute) + added)
        first += mean.numel()
