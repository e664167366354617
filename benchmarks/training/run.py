"""A run, epoch by epoch: SGD with the authors' plan, the averages that ride along, and the tests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import fastswa
from benchmarks import networks
from benchmarks.training import augmentation, datasets, log, plan
from benchmarks.training.averages import Averages
from benchmarks.training.evaluation import Score, Tally, evaluate, score_of
from benchmarks.training.options import Options, disagreement

OnCollect = Callable[[int, nn.Module], None]
"""Called with the number of iterations since the beginning, and the model, whenever SWA has taken it."""


class Run:
    """A run between two epochs: all that a checkpoint holds.

    Args:
        options: of the run.
        dataset: that it is about.
        device: where it trains.
    """

    def __init__(self, options: Options, dataset: datasets.Dataset, device: torch.device | str = "cpu") -> None:
        self.options, self.dataset, self.device = options, dataset.to(device), torch.device(device)
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        torch.manual_seed(options.seed)
        model = networks.build(options.model, dataset.classes, dataset.channels)
        self.model = model.to(device=self.device, dtype=dataset.dtype, memory_format=self.memory_format)
        self.optimizer = SGD(
            model.parameters(), options.lr_init, momentum=options.momentum, weight_decay=options.weight_decay
        )
        self.averages = Averages(self.model, options)
        self.rows: list[log.Row] = []
        """Of the epochs so far."""
        self._cycle: fastswa.CyclicalSWALR | None = None

    @property
    def scores(self) -> dict[str, Score]:
        """The latest epoch's tests: of the plain model as "sgd", and of the averages by name."""
        row, names = asdict(self.rows[-1]), {"sgd": "test", "swa": "swa", "ema": "ema", "swag": "swag"}
        found = {name: (row[f"{column}_loss"], row[f"{column}_accuracy"]) for name, column in names.items()}
        return {name: Score(*score) for name, score in found.items() if score[0] is not None}

    def epoch(self, after_iteration: Callable[[], object], on_collect: OnCollect | None = None) -> log.Row:
        """Train for an epoch, and test.

        Args:
            after_iteration: called after each.
            on_collect: sees the models that are collected.

        Returns:
            The epoch's row, which is then the last one of `rows`.

        Raises:
            FloatingPointError: the loss is not finite any more.
        """
        started, epoch, options = time.perf_counter(), len(self.rows) + 1, self.options
        # Dropout draws from torch's generator, so that this too depends on nothing but the seed and the epoch.
        torch.manual_seed(augmentation.seed_of(options.seed, epoch, "dropout"))
        train, learning_rate = self._train(epoch, after_iteration, on_collect)
        if not math.isfinite(train.loss):
            raise FloatingPointError(f"the loss is {train.loss} in epoch {epoch}: lower lr_init ({options.lr_init:g})")
        tests = self._test(epoch) if plan.evaluated(options, epoch) else {}
        seconds = time.perf_counter() - started
        self.rows.append(log.Row(epoch, learning_rate, *train, **tests, seconds=seconds))
        return self.rows[-1]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "options": asdict(self.options),
            "epoch": len(self.rows),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "cycle": None if self._cycle is None else self._cycle.state_dict(),
            "averages": self.averages.state_dict(),
            "rows": [asdict(row) for row in self.rows],
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was saved.

        Args:
            state: as `state_dict` gave it.

        Raises:
            ValueError: the run has other options; the first is named.
        """
        other = disagreement(state["options"], asdict(self.options))
        if other:
            raise ValueError(f"the checkpoint is of another run: {other}")
        self.model.load_state_dict(state["model"])
        if state["cycle"] is not None:
            # Making it sets the first rates of a cycle; the optimizer's state, loaded after it, has the present ones.
            self._start_cycle().load_state_dict(state["cycle"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averages.load_state_dict(state["averages"])
        self.rows = [log.Row(**row) for row in state["rows"]]
        torch.set_rng_state(state["random"].cpu())

    def _train(
        self, epoch: int, after_iteration: Callable[[], object], on_collect: OnCollect | None
    ) -> tuple[Score, float]:
        """The score of the batches as they were trained on, and the last learning rate."""
        tally, model, batches = Tally(self.device), self.model, self._batches(augmentation.training_batches, epoch)
        if plan.cyclical(self.options, epoch):
            self._cycle = self._cycle or self._start_cycle()
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = plan.rate(self.options, epoch)
        model.train()
        for number, (images, labels) in enumerate(batches, start=1):
            with self._precision():
                scores = model(images)
                loss = cross_entropy(scores, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.averages.after_step()
            tally.add(loss, scores, labels)
            learning_rate: float = self.optimizer.param_groups[0]["lr"]
            if self._collects(epoch, number == len(batches)):
                self.averages.collect()
                if on_collect is not None:
                    on_collect((epoch - 1) * len(batches) + number, model)
            if self._cycle is not None:
                self._cycle.step()
            after_iteration()
        return tally.score(), learning_rate

    def _collects(self, epoch: int, last: bool) -> bool:
        if self._cycle is not None:
            return self._cycle.collect
        return last and plan.averaging(self.options, epoch)

    @torch.no_grad()
    def _test(self, epoch: int) -> dict[str, float]:
        """Losses and accuracies on the test set, by their columns in a row."""
        images = self._batches(augmentation.statistics_batches, epoch)
        tests = augmentation.test_batches(self.dataset, max(128, self.options.batch_size), self.memory_format)
        with self._precision():
            scores = {"test": evaluate(self.model, tests, self.device)}
            for name, average in self.averages.recomputed(images):
                scores[name] = evaluate(average, tests, self.device)
            if epoch == self.options.epochs:
                mean = self.averages.ensemble(images, tests, self.options.swag_samples)
                if mean is not None:
                    scores["swag"] = score_of(mean, tests.labels)
        return {f"{name}_{kind}": value for name, score in scores.items() for kind, value in score._asdict().items()}

    def _batches(self, kind: Callable[..., augmentation.Batches], epoch: int) -> augmentation.Batches:
        return kind(self.dataset, self.options.batch_size, self.options.seed, epoch, self.memory_format)

    def _start_cycle(self) -> fastswa.CyclicalSWALR:
        length = self.options.cycle or len(self._batches(augmentation.training_batches, 1))
        self._cycle = fastswa.CyclicalSWALR(self.optimizer, self.options.swa_lr, self.options.swa_lr_min, length)
        return self._cycle

    def _precision(self) -> torch.autocast:
        # Without the cache of converted weights, which would not see that SWAG writes others in their place.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp, cache_enabled=False)
