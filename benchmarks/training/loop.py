"""Training from the first epoch, or from a checkpoint, to the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.training import checkpoint, datasets, log
from benchmarks.training.options import Options
from benchmarks.training.run import OnCollect, Run


def images_for(options: Options, data_path: Path | str | None = None) -> datasets.Dataset:
    """The images that a run is about, in its dtype; the digits' split depends on the run's seed.

    Args:
        options: of the run.
        data_path: folder of CIFAR's files.
    """
    dataset = datasets.load(options.dataset, data_path, options.seed)
    dataset = replace(dataset, dtype=torch.float64 if options.double else torch.float32)
    # The other networks take images of 32x32 pixels.
    return dataset.enlarged() if options.dataset == "digits" != options.model else dataset


def train(
    options: Options,
    dataset: datasets.Dataset,
    *,
    device: torch.device | str = "cpu",
    output: Path | None = None,
    save_every: int = 1,
    resume: Mapping[str, Any] | None = None,
    on_collect: OnCollect | None = None,
    progress: bool = False,
) -> Run:
    """Train as the options say.

    Args:
        options: of the run.
        dataset: such as `images_for` gives.
        device: where to train.
        output: folder of the log and the checkpoint; None to write nothing.
        save_every: epochs between checkpoints; the last epoch always gets one.
        resume: a checkpoint, to go on from.
        on_collect: called with the number of iterations since the beginning, and the model, whenever SWA has taken it.
        progress: show a bar, and a line of a table for each epoch.

    Returns:
        The run after its last epoch: `model`, `averages`, `rows`, `scores`.

    Raises:
        ValueError: the checkpoint is of a run with other options; the first is named.
        FloatingPointError: the loss is not finite any more; the last checkpoint stays.

    Example:
        >>> options = Options.of("digits", swa=True, epochs=4, swa_start=3)
        >>> iterations = []
        >>> run = train(options, images_for(options), on_collect=lambda iteration, model: iterations.append(iteration))
        >>> iterations, sorted(run.scores), len(run.rows)
        ([30, 40], ['sgd', 'swa'], 4)
    """
    run = Run(options, dataset, device)
    if resume is not None:
        run.load_state_dict(resume)
    if output is not None:
        log.write(output / log.NAME, run.rows)
    iterations = -(-len(dataset.training_labels) // options.batch_size)
    done, total = len(run.rows) * iterations, options.epochs * iterations
    with tqdm(initial=done, total=total, unit="batch", disable=not progress, leave=False) as bar:
        if progress:
            for text in (log.heading(), *map(log.line, run.rows)):
                bar.write(text)
        for epoch in range(len(run.rows) + 1, options.epochs + 1):
            bar.set_description(f"epoch {epoch} of {options.epochs}")
            row = run.epoch(bar.update, on_collect)
            if output is not None:
                log.append(output / log.NAME, row)
                if epoch % save_every == 0 or epoch == options.epochs:
                    checkpoint.save(output / checkpoint.NAME, run.state_dict())
            if progress:
                bar.write(log.line(row))
    return run
