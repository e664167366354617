"""Predictions averaged over samples of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from fastswa.batch_norm import update_bn
from fastswa.batch_norm.batches import Batches, Forward
from fastswa.batch_norm.layers import find, in_one_place
from fastswa.rules import check_integer
from fastswa.swag import SWAG


def probabilities(logits: Tensor) -> Tensor:
    """The softmax over the classes, in float64.

    Args:
        logits: (N, classes, ...), of any floating dtype.

    Returns:
        Probabilities of the same shape.
    """
    return logits.softmax(1, dtype=torch.float64)


@torch.no_grad()
def average_predictions(
    swag: SWAG,
    loader: Iterable[Any],
    samples: int = 30,
    *,
    bn_loader: Iterable[Any] | None = None,
    scale: float = 1.0,
    diagonal_only: bool = False,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
    device: int | torch.device | str | None = None,
    activation: Callable[[Tensor], Tensor] | None = probabilities,
    progress: bool = False,
) -> Tensor:
    r"""What samples of the weights predict, on average.

    .. math:: p(y \mid x) = \frac 1 S \sum_{s = 1}^{S} p(y \mid x, \theta_s)

    The model that `swag` follows holds one sample after another, predicts in evaluation mode, and afterwards has its
    own weights, buffers and modes. The sum is float64, on the device where `activation` leaves its results.

    Args:
        swag: that follows a module and has collected at least two models.
        loader: of the inputs, in the same order each time it is run through. The model gets a batch that is a tensor;
            the first element of a list or tuple; a mapping as keyword arguments.
        samples: S, at least 1; each is a pass through `loader`.
        bn_loader: of training data, with which `update_bn` recomputes the statistics of BatchNorm for each sample,
            weighted by batch size as by the authors. A model that has them predicts badly without.
        scale: by which the covariance is multiplied, at least 0.
        diagonal_only: sample from SWAG-Diagonal.
        generator: on the CPU, for the samples; torch's default one if left out.
        forward: (model, batch), calls the model, for both loaders; the batch is then the loader's whole.
        device: where batches are moved, whatever their structure; left where they are if left out.
        activation: from the model's output to what is averaged; None for the output itself. One that ends in `.cpu()`
            keeps large predictions out of a GPU's memory.
        progress: show a bar (needs tqdm).

    Returns:
        (N, ...), float64: for classes, the mean probabilities of all N inputs.

    Raises:
        RuntimeError: there is nothing to sample from, as `SWAG.refusal` says.
        ValueError: no batches; batches in another order or number than before; a loader that shuffles or gives its
            batches once; an argument out of its range.
        TypeError: a SWAG of tensors without a module; a model that returns no tensor.
        ImportError: a bar without tqdm.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> swag = SWAG(model)
        >>> for _ in range(3):
        ...     _ = torch.nn.init.normal_(model.weight)
        ...     swag.collect()
        >>> average_predictions(swag, [torch.randn(8, 4), torch.randn(5, 4)], samples=10).shape
        torch.Size([13, 3])

    References:
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning, Algorithm 1: Bayesian model
        averaging.
    """
    check_integer("samples", samples, 1)
    module = _module(swag, bn_loader)
    for name, each in (("loader", loader), ("bn_loader", bn_loader)):
        if samples > 1 and isinstance(each, Iterator):
            raise ValueError(f"{name} is run through for each sample, but it is an iterator, which gives batches once")
    if _shuffles(loader):
        raise ValueError(
            "the loader shuffles, so predictions of different inputs would be averaged; pass shuffle=False"
        )
    numbers = _numbers(samples, progress)
    place = None if device is None else torch.device(device)
    batches = Batches(loader, place, forward, None, skip_single=False, ahead=True, progress=False)
    totals: list[Tensor] = []
    with in_one_place(module), swag.sampled(scale, diagonal_only, generator):
        for number in numbers:
            if number:
                swag.sample_(None, scale, diagonal_only, generator)
            if bn_loader is not None:
                update_bn(bn_loader, module, place, estimator="weighted", forward=forward)
            module.eval()
            predictions = (_checked(run()) for run, _ in batches.through(module, "predictions"))
            _add(totals, predictions if activation is None else map(activation, predictions), number)
    return torch.cat(totals).div_(samples)


def _module(swag: SWAG, bn_loader: object) -> nn.Module:
    module = swag.module
    if module is None:
        raise TypeError("the SWAG follows tensors without a module, which predict nothing; make it of a module")
    if bn_loader is None and find(module, None)[0]:
        warnings.warn(
            "the model has BatchNorm layers, whose statistics are of other weights than the samples'; "
            "pass training data as bn_loader",
            stacklevel=4,
        )
    return module


def _shuffles(loader: object) -> bool:
    samplers = [getattr(part, "sampler", None) for part in (loader, getattr(loader, "batch_sampler", None))]
    return any(isinstance(each, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)) for each in samplers)


def _numbers(samples: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(samples)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install fastswa[progress]") from error
    bar: Iterable[int] = tqdm(range(samples), desc="samples", unit="sample")
    return bar


def _checked(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}, not a tensor; pass forward=lambda model, batch: "
            "model(batch[0]).logits, or the like"
        )
    return output


def _add(totals: list[Tensor], predictions: Iterable[Tensor], number: int) -> None:
    """Add one sample's predictions to the sums of the samples before."""
    count = 0
    for index, prediction in enumerate(predictions):
        count += 1
        if not number:
            totals.append(prediction.to(torch.float64, copy=True))
            continue
        if index >= len(totals) or prediction.shape != totals[index].shape:
            count = -1
            break
        totals[index] += prediction
    if not count:
        raise ValueError("the loader gave no batches")
    if count != len(totals):
        raise ValueError(
            f"the loader gave other batches for sample {number + 1} than for the first; it must give the same ones in "
            "the same order each time"
        )
