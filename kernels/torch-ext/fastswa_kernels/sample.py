"""Samples of the normal distribution that running moments describe, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments_arguments import check_sample
from .moments_table import prepare
from .pairs import dense_like
from .rounding import seed_key, step_key
from .sample_kernel import sample_kernel
from .table import layout_refusal


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

    `fastswa_kernels.reference.sample_` is the specification: the same standard normal numbers :math:`z`, a function of
    seed, step and element, to the last bits of a logarithm and a sine.

    Args:
        targets: tensors of float32, bfloat16, float16 or float64; any shape and offset; written. One with other strides
            than its mean or on another device is written through a copy.
        means: one CUDA tensor for each target, of its shape; any of those dtypes; read. One with gaps between its
            elements is copied first.
        variances: one for each mean, of its dtype and device; not negative; read only where `diagonal` is not 0. With
            other strides than its mean it is copied first.
        deviations: K >= 0 lists like the variances; a list of coefficient 0 is not read.
        coefficients: K finite floats, or a floating tensor of shape (K,), read by the host.
        diagonal: factor s >= 0 of the standard deviations; 0 draws no numbers.
        seed: any integer, modulo 2^64.
        step: likewise; each has numbers of its own.

    Raises:
        ValueError: lists of different length, shapes, dtypes or devices that differ, targets that overlap what is read,
            coefficients of another number or not finite, a negative diagonal; nothing has been written.
        TypeError: a dtype that is not one of the four, numbers of another type; nothing has been written.

    Example:
        >>> mean, variance = [torch.zeros(1000, device="cuda")], [torch.ones(1000, device="cuda")]
        >>> ring, target = [[torch.ones(1000, device="cuda")]], [torch.empty(1000, device="cuda")]
        >>> sample_(target, mean, variance, ring, [10.0], 1.0, seed=1, step=7)
        >>> target[0][:3].cpu()
        tensor([ 9.9431, 10.6618,  8.1344])

    References:
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning, section 3.2.
    """
    indices = check_sample(targets, means, variances, deviations, coefficients, diagonal)
    given = coefficients.tolist() if isinstance(coefficients, Tensor) else coefficients
    factors = [float(factor) for factor in given if factor != 0]
    used = [list(tensors) for tensors, factor in zip(deviations, given, strict=True) if factor != 0]
    to, read, back = list(targets), [list(means), list(variances), *used], []
    for index in indices:
        target, mean = targets[index], means[index]
        for tensors in read:
            tensor = tensors[index]
            if layout_refusal(mean, tensor):
                tensors[index] = dense_like(mean, tensor.dtype).copy_(tensor)
        if layout_refusal(mean, target):
            to[index] = dense_like(mean, target.dtype)
            back.append((target, to[index]))
    for launch in prepare(to, read[0], read[1], read[2:], indices, "TARGET"):
        device = launch.table.device
        # From pinned memory: a copy from any other would wait for the device.
        numbers = torch.tensor([float(diagonal), *factors], dtype=launch.compute, pin_memory=device.type == "cuda")
        launch.launch(
            sample_kernel,
            numbers.to(device, non_blocking=True),
            step_key(seed_key(seed), step),
            DIAGONAL=bool(diagonal),
        )
    for target, copy in back:
        target.copy_(copy)
