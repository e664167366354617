"""update_bn: torch.optim.swa_utils.update_bn without a host read for each layer, all or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import distributed, nn

from fastswa.batch_norm.batches import Batches, Forward
from fastswa.batch_norm.confidence import Confidence
from fastswa.batch_norm.engines import Choice, EagerEngine, Engine, Estimator, MergeEngine, choose, compiled
from fastswa.batch_norm.group import Seen, add_up, telling_others
from fastswa.batch_norm.layers import (
    Layer,
    Statistics,
    commit,
    data_parallel_device,
    find,
    in_one_place,
    lent,
    not_finite,
    refuse_not_finite,
    restored_on_failure,
    scripted_layer,
)
from fastswa.batch_norm.report import BNUpdateReport
from fastswa.batch_norm.sweeps import SweepEngine


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: int | torch.device | str | None = None,
    *,
    estimator: Estimator = "torch",
    sweeps: int = 0,
    max_batches: int | None = None,
    rtol: float | None = None,
    min_batches: int = 8,
    forward: Forward | None = None,
    process_group: distributed.ProcessGroup | None = None,
    layers: Callable[[str, nn.Module], bool] | None = None,
    on_singleton: str = "error",
    check_finite: bool = True,
    prefetch: bool = True,
    progress: bool = False,
    engine: Choice = "auto",
) -> BNUpdateReport:
    r"""Set every BatchNorm layer's running statistics to the averages over a pass through the data.

    .. math:: \mu = \frac{1}{W} \sum_{k=1}^{K} w_k \mu_k, \qquad \sigma^2 = \frac{1}{W} \sum_{k=1}^{K} w_k \sigma_k^2

    over the K batches' means and unbiased variances. As it is called in torch (:math:`w_k = 1`), it gives the numbers
    of torch.optim.swa_utils.update_bn, bit for bit on a CPU, and no layer waits for the device. Nothing is changed
    unless all of it succeeds; afterwards momenta and each module's mode are as they were. A layer that no batch
    reached keeps its statistics, with a warning.

    Layers with half-precision statistics differ from torch's on purpose: the cumulative average stalls there, so the
    batches' statistics are merged in float64. Those of a compiled model are too, because torch's way would not run its
    graph. As in torch the model runs in training mode, so dropout is active, and modules that update buffers of their
    own while training do so. A model in DistributedDataParallel or DataParallel runs without sending its
    buffers to other processes or devices; SyncBatchNorm goes on asking the other processes at each batch.

    Args:
        loader: an iterable of batches. The model gets a batch that is a tensor; the first element of a list or tuple;
            a mapping as keyword arguments.
        model: such as an AveragedModel; its BatchNorm layers (also SyncBatchNorm) are updated in place.
        device: where batches are moved, whatever their structure; left where they are if left out.
        estimator: "torch" gives every batch the same weight; "weighted" its number of samples, as the paper's authors
            do, which a short last batch makes better; "population" pools all values of a channel (and divides by
            their number), as fvcore does.
        sweeps: further passes in evaluation mode, each of which replaces the statistics by the pooled ones of what
            reaches a layer. As many as there are layers give the exact statistics of every layer, whatever the
            batches' size and order; fewer already help. The loader must give its batches anew each time.
        max_batches: at most this many batches in each pass.
        rtol: stop the first pass when every channel's standard error is below it: of the mean in standard deviations,
            of the variance in variances. For loaders that shuffle.
        min_batches: before which `rtol` does not stop a pass; at least 2.
        forward: (model, batch), calls the model; the batch is then the loader's whole.
        process_group: of processes that each see a part of the data. All end with the same statistics, of all data.
        layers: (name, module) -> bool, the BatchNorm layers to update. The others keep their statistics and normalise
            with them meanwhile, as in evaluation mode.
        on_singleton: "error" raises at a batch of one sample where a layer can't normalise it; "skip" leaves batches
            of one sample out.
        check_finite: raise if statistics are NaN or infinite; if not, they are written.
        prefetch: on a CUDA device, copy a batch there while the one before is in use.
        progress: show a bar (needs tqdm), on the group's first process only.
        engine: "eager" lets the layers average by their own kernels; "merge" merges the statistics of all layers after
            each batch, in float64; "auto" takes "eager" where it serves.

    Returns:
        What was done.

    Raises:
        ValueError: no batches (an empty or exhausted loader); statistics that are not finite, naming the layers; a
            layer that is not initialised; an argument out of its range; a loader that can't be run through again.
        TypeError: a torch.jit.script model, whose layers can't be reached.
        RuntimeError: another process of the group failed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> swa_model = AveragedModel(model)
        >>> swa_model.update_parameters(model)
        >>> report = update_bn([torch.randn(16, 4) for _ in range(5)], swa_model)
        >>> report.batches, report.samples, report.layers
        (5, 80, ('1',))

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, section 3.2;
        torch.optim.swa_utils.update_bn; fvcore.nn.update_bn_stats.
    """
    start = time.perf_counter()
    _check_arguments(loader, estimator, sweeps, max_batches, rtol, min_batches, on_singleton, progress, process_group)
    hidden = scripted_layer(model)
    if hidden:
        raise TypeError(f"update_bn can't reach the layers of torch.jit.script: {hidden}; call it before scripting")
    found, excluded = find(model, layers)
    if not found:
        return BNUpdateReport(0, 0, (), (), None, time.perf_counter() - start)
    is_compiled = compiled(model) or hasattr(forward, "_torchdynamo_orig_callable")
    needs_moments = "rtol" if rtol is not None else "process_group" if process_group is not None else None
    chosen = choose(engine, estimator, needs_moments, is_compiled, found)
    bar = progress and (process_group is None or distributed.get_rank(process_group) == 0)
    place = data_parallel_device(model) if device is None else torch.device(device)
    batches = Batches(loader, place, forward, max_batches, on_singleton == "skip", prefetch, bar)

    with restored_on_failure(model, found):
        with in_one_place(model):
            model.train()
            for module in excluded:
                module.eval()
            # A layer that its model keeps in evaluation mode goes on using its own statistics.
            taking = [layer for layer in found if any(m.training and m.track_running_stats for m in layer.modules)]
            if not taking:
                return BNUpdateReport(0, 0, (), (), None, time.perf_counter() - start)
            first: Engine = (
                EagerEngine(taking, estimator == "weighted", is_compiled)
                if chosen == "eager"
                else MergeEngine(taking, estimator, is_compiled)
            )
            watched = first.moments
            confidence = Confidence(watched, rtol, min_batches, check_finite) if watched else None
            seen = _collect(first, taking, model, batches, "update_bn", confidence, process_group)
            statistics = first.statistics(seen.calls)
            worst = float(watched.progress(seen.batches)[0]) if watched and seen.batches > 1 else None
            for number in range(sweeps):
                model.eval()
                sweep = SweepEngine(taking, statistics, is_compiled)
                title = f"sweep {number + 1} of {sweeps}"
                again = _collect(sweep, taking, model, batches, title, None, process_group)
                statistics = _replaced(statistics, sweep.statistics(again.calls))
        if check_finite:
            refuse_not_finite(taking, statistics)
        updated, never_called = commit(taking, statistics)
    return BNUpdateReport(seen.batches, seen.samples, updated, never_called, worst, time.perf_counter() - start)


def _check_arguments(
    loader: Iterable[Any],
    estimator: str,
    sweeps: int,
    max_batches: int | None,
    rtol: float | None,
    min_batches: int,
    on_singleton: str,
    progress: bool,
    process_group: object,
) -> None:
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {get_args(Estimator)}, got {estimator!r}")
    if on_singleton not in ("error", "skip"):
        raise ValueError(f"on_singleton must be 'error' or 'skip', got {on_singleton!r}")
    if sweeps < 0:
        raise ValueError(f"sweeps must be at least 0, got {sweeps}")
    if sweeps and isinstance(loader, Iterator):
        raise ValueError("sweeps run through the loader again, but it is an iterator, which gives its batches once")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    if min_batches < 2:
        raise ValueError(f"min_batches must be at least 2, because one batch has no standard error, got {min_batches}")
    if progress and find_spec("tqdm") is None:
        raise ValueError("progress=True needs tqdm: pip install fastswa[progress]")
    if process_group is not None and not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup, got {type(process_group).__name__}")


def _collect(
    engine: Engine,
    layers: Sequence[Layer],
    model: nn.Module,
    batches: Batches,
    title: str,
    confidence: Confidence | None,
    group: distributed.ProcessGroup | None,
) -> Seen:
    """Run one pass, and put together what all processes saw."""
    run = samples = 0
    with telling_others(group, engine.moments, len(layers)):
        with lent(layers, engine.buffers, engine.momentum), engine.running():
            for forward, count in batches.through(model, title):
                try:
                    engine.batch(forward, count)
                except (TypeError, ValueError) as error:
                    _explain(error)
                    raise
                run += 1
                samples += count or 0
                if confidence is not None and confidence.enough(run):
                    break
        if confidence is not None and confidence.spoilt:
            raise not_finite(layers[index].name for index in confidence.spoilt_layers())
    seen = Seen(run, samples, engine.calls())
    if group is not None and engine.moments is not None:
        seen = add_up(group, engine.moments, seen)
    if not seen.batches:
        raise ValueError(f"the loader gave no batches ({title}); an iterator that was used before is exhausted")
    return seen


def _explain(error: TypeError | ValueError) -> None:
    """Say what to do about the errors that a model raises most."""
    if isinstance(error, TypeError):
        error.add_note("update_bn: if the model takes other arguments, pass forward=lambda model, batch: model(...)")
    elif "more than 1 value per channel" in str(error):
        error.add_note("update_bn: a batch of one sample; make the loader drop it, or pass on_singleton='skip'")


def _replaced(old: Sequence[Statistics], new: Sequence[Statistics]) -> list[Statistics]:
    """New statistics for the layers that were called, with the first pass's number of batches."""
    return [
        (other[0], other[1], before[2] or other[2]) if other[2] else before
        for before, other in zip(old, new, strict=True)
    ]
