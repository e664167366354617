"""Training steps with an average or without: what `python -m benchmarks step` times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastswa
from benchmarks.networks import GPT2, PreActivationResNet, ResNet50
from benchmarks.providers import CACHED, DECAY, EMA, OURS, PLANS, TORCH, Exact, Prepared
from benchmarks.registry import providers_of
from benchmarks.verify import YES, refusal, tolerance

CHECKED_STEPS = 3


@dataclass(frozen=True)
class Work:
    """A network and what it is trained on.

    Args:
        network: new, on the CPU.
        batch: new samples and labels, on the CPU.
        optimizer: of parameters.
        half: whether passes run in bfloat16 autocast, and images in channels_last.
    """

    network: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    optimizer: Callable[..., torch.optim.Optimizer]
    half: bool = False


def _images(count: int, channels: int, pixels: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, channels, pixels, pixels), torch.randint(classes, (count,))


def _text(count: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (count, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


_SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
WORKS: Mapping[str, Mapping[str, Work]] = {
    "cpu": {
        # The demo's network and its batch of 16 digits; the time does not depend on what the pixels show.
        "digits": Work(PreActivationResNet, partial(_images, 16, 1, 8, 10), _SGD),
    },
    "cuda": {
        "resnet50": Work(ResNet50, partial(_images, 128, 3, 224, 1000), _SGD, half=True),
        "gpt2": Work(GPT2, partial(_text, 8, 1024, 50257), partial(torch.optim.AdamW, lr=1e-4, fused=True), half=True),
    },
}
"""By device, then by name."""


@dataclass(frozen=True)
class Way:
    """A way to average during training.

    Args:
        setup: for a model: the update, and what waits for its end.
        exact: what the average is of the models.
        ours: whether its result is fastswa's responsibility.
    """

    setup: Callable[[nn.Module], tuple[Prepared, Callable[[], object]]]
    exact: Exact
    ours: bool = False


def _registered(name: str) -> Way:
    provider = providers_of("fp32")[name]
    return Way(lambda model: (provider.setup(model, PLANS["fp32"]), lambda: None), provider.exact[0], provider.ours)


def _weight_averages(model: nn.Module, **options: Any) -> tuple[Prepared, Callable[[], object]]:
    averages = fastswa.WeightAverages(model, fastswa.EMA(DECAY), **options)
    return Prepared(averages.update, lambda: [averages.weights()]), averages.wait


OVERLAP, OFFLOAD = (f"fastswa WeightAverages, {how}" for how in ("overlap", "on the CPU"))
WAYS: Mapping[str, Way] = {
    TORCH: _registered(TORCH),
    CACHED: _registered(CACHED),
    OURS: _registered(OURS),
    "fastswa WeightAverages": Way(_weight_averages, EMA, ours=True),
    OVERLAP: Way(partial(_weight_averages, overlap=True), EMA, ours=True),
    OFFLOAD: Way(partial(_weight_averages, device="cpu"), EMA, ours=True),
}
"""By the names in the results. The last two are the same as the one before where the model is on the CPU."""


class Training:
    """Steps on one batch.

    Args:
        work: what is trained.
        device: where.
        way: to average; None for training alone.
    """

    def __init__(self, work: Work, device: torch.device, way: Way | None = None) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if work.half else torch.preserve_format
        self.model = work.network().to(device)
        samples, self._labels = (tensor.to(device) for tensor in work.batch())
        if samples.dim() == 4:
            self.model, samples = self.model.to(memory_format=layout), samples.to(memory_format=layout)
        self._samples = samples
        self._optimizer = work.optimizer(self.model.parameters())
        self._precision = torch.autocast(device.type, torch.bfloat16) if work.half else nullcontext()
        self._exact = None if way is None else way.exact
        self._prepared, self._wait = (None, lambda: None) if way is None else way.setup(self.model)

    def step(self) -> None:
        """Train once, without averaging."""
        self._optimizer.zero_grad()
        with self._precision:
            scores = self.model(self._samples)
            loss = cross_entropy(scores.flatten(0, -2), self._labels.flatten())
        loss.backward()
        self._optimizer.step()

    def timed_step(self) -> float:
        """Train once, and average.

        Returns:
            Microseconds on the host that averaging took; without averaging those of the step.
        """
        if self._prepared is None:
            return _microseconds(self.step)
        self.step()
        return _microseconds(self._prepared.update)

    def steps(self, count: int) -> None:
        """Train, average after each step, and wait for the last update.

        Args:
            count: steps.
        """
        for _ in range(count):
            self.step()
            if self._prepared is not None:
                self._prepared.update()
        self._wait()

    def check(self) -> str:
        """Average the new model and a few trained ones, and compare with the same in float64.

        Returns:
            "yes", or what is wrong.
        """
        if self._prepared is None or self._exact is None:
            return YES
        seen = []
        # A moving average may begin with the model that it was made of, or with the first that it is given.
        self._prepared.update()
        for step in range(1 + CHECKED_STEPS):
            if step:
                self.steps(1)
            seen.append([parameter.detach().double() for parameter in self.model.parameters()])
        (average,) = self._prepared.averages() if self._prepared.averages is not None else ()
        for (name, _), *models in zip(self.model.named_parameters(), *seen, strict=True):
            largest = max(model.abs().max().item() for model in models)
            # `exact` adds to its first model in place.
            expected = self._exact([models[0].clone(), *models[1:]])
            error = (average[name].detach().to(expected.device).double() - expected).abs().max().item()
            allowed = tolerance(torch.float32) * largest
            # Negated, so that NaN is wrong too.
            if not error <= allowed:
                return f"wrong: {name} is off by {error:.2g}, {allowed:.2g} allowed"
        return YES


def trainings(work: Work, device: torch.device, ways: Mapping[str, Way]) -> tuple[dict[str, Training], dict[str, str]]:
    """Prepare a training for each way to average, and check the averages.

    Args:
        work: what is trained.
        device: where.
        ways: by name.

    Returns:
        The trainings that may be timed, and a verdict for each way: "yes", "wrong: ..." or "skipped: ...".
    """
    ready: dict[str, Training] = {}
    verdicts: dict[str, str] = {}
    for name, way in ways.items():
        try:
            training = Training(work, device, way)
            verdicts[name] = training.check()
        except Exception as error:
            verdicts[name] = refusal(error, way.ours)
            continue
        if verdicts[name] == YES:
            ready[name] = training
    return ready, verdicts


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3
