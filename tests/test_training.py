"""Training follows the authors' plan and averages what it should."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.__main__ import main
from benchmarks.training import augmentation, checkpoint, plan
from benchmarks.training.loop import images_for, train
from benchmarks.training.options import Options
from benchmarks.training.run import Run


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The number of threads decides how sums are split up, and so their last bits.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "options",
    [
        Options.of("cifar100", "vgg16"),
        Options.of("cifar100", "vgg16", swa=True),
        Options.of("cifar10", "preresnet110", swa=True),
        Options.of("digits", swa=True, swa_schedule="cyclical", epochs=90),
    ],
)
def test_the_plan_is_the_authors_formula(options: Options) -> None:
    first = Fraction(options.lr_init)
    ratio = Fraction(options.swa_lr) / first if options.swa else Fraction(1, 100)
    for epoch in range(options.epochs):
        t = Fraction(epoch, options.swa_start if options.swa else options.epochs)
        if t <= Fraction(1, 2):
            factor = Fraction(1)
        elif t <= Fraction(9, 10):
            factor = 1 - (1 - ratio) * (t - Fraction(1, 2)) / Fraction(2, 5)
        else:
            factor = ratio
        # A few roundings of numbers near 1.
        assert plan.rate(options, epoch + 1) == pytest.approx(float(first * factor), rel=4 * 2**-52)


@pytest.mark.parametrize(
    ("dataset", "model", "swa", "expected"),
    [
        ("cifar100", "vgg16", False, (200, 0.05, 5e-4)),
        ("cifar100", "vgg16", True, (300, 0.05, 5e-4, 161, 0.01)),
        ("cifar10", "preresnet110", False, (150, 0.1, 3e-4)),
        ("cifar10", "preresnet164", True, (225, 0.1, 3e-4, 126, 0.01)),
        ("cifar100", "preresnet164", True, (225, 0.1, 3e-4, 126, 0.05)),
        ("cifar10", "wrn28x10", True, (300, 0.1, 5e-4, 161, 0.05)),
    ],
)
def test_defaults_are_the_authors_settings(dataset: str, model: str, swa: bool, expected: tuple[float, ...]) -> None:
    options = Options.of(dataset, model, **({"swa": True} if swa else {}))
    found = (options.epochs, options.lr_init, options.weight_decay, options.swa_start, options.swa_lr)
    assert found[: len(expected)] == expected
    assert (options.batch_size, options.momentum) == (128, 0.9)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 0}, "epochs must be between 1"),
        ({"epochs": 10, "swa": True}, "swa_start must be one of the 10 epochs, got 46"),
        ({"swa_lr": 0.1}, "swa_lr means nothing without swa"),
        ({"swa": True, "cycle": 5}, "cycle means nothing without swa_schedule='cyclical'"),
        ({"swag": True}, "swag means nothing without swa"),
        ({"swa": True, "swag_rank": 5}, "swag_rank means nothing without swag"),
        ({"swa": True, "swa_schedule": "cyclical", "swa_lr_min": 0.06}, "swa_lr_min must be between 0 and 0.05"),
        ({"ema_decay": 1.5}, "ema_decay must be between 0 and 1"),
        ({"momentum": float("nan")}, "momentum must be between 0 and 1"),
        ({"amp": True, "double": True}, "amp and double exclude each other"),
        ({"model": "resnet"}, "model must be one of digits, "),
    ],
)
def test_options_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Options.of("digits", **given)


def test_sgd_and_swa_by_hand() -> None:
    """Five epochs written out in plain torch: one loop for rates, steps, collections and the pass for BatchNorm."""
    options = Options.of(
        "digits", epochs=5, swa=True, swa_start=4, swa_lr=0.02, momentum=0.8, weight_decay=0.01, seed=3
    )
    dataset = images_for(options)
    collected: list[int] = []
    run = train(options, dataset, on_collect=lambda iteration, model: collected.append(iteration))

    torch.manual_seed(3)
    model = networks.build("digits", 10, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.8, weight_decay=0.01)
    sums: dict[str, Tensor] = {}
    # 0.1 until t = 1/2; at t = 3/4 the descent to 0.02 has gone 5/8 of its way; at t = 1 it is over.
    for epoch, rate in enumerate([0.1, 0.1, 0.1, 0.05, 0.02], start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for images, labels in augmentation.training_batches(dataset, 16, 3, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        if epoch >= 4:
            for name, weight in model.named_parameters():
                sums[name] = sums.get(name, 0) + weight.detach().double()
    assert collected == [40, 50]
    # The rates differ in their last bit, and 50 steps through BatchNorm and ReLU multiply that.
    close = {"rtol": 1e-3, "atol": 1e-4}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(run.model.get_parameter(name), weight, **close)
    assert run.averages.swa is not None
    for name, weight in run.averages.swa.module.named_parameters():
        torch.testing.assert_close(weight.double(), sums[name] / 2, **close)

    # The average's statistics: by samples, over the pass of the last epoch.
    average = networks.build("digits", 10, 1)
    average.load_state_dict(run.averages.swa.module.state_dict())
    for module in average.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for images, _ in augmentation.statistics_batches(dataset, 16, 3, 5):
            average(images)
        scores = average.eval()(dataset.test_images.float() / 16)
    expected = 100 * (scores.argmax(1) == dataset.test_labels).double().mean().item()
    loss = nn.functional.cross_entropy(scores, dataset.test_labels).item()
    assert run.scores["swa"].accuracy == pytest.approx(expected, abs=100 / 1637 + 1e-9)
    assert run.scores["swa"].loss == pytest.approx(loss, rel=1e-4)


def test_cyclical_collections_are_at_the_lowest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    cyclical = {"swa": True, "swa_start": 2, "swa_lr": 0.05, "swa_schedule": "cyclical", "cycle": 4, "swa_lr_min": 0.01}
    options = Options.of("digits", epochs=3, **cyclical)
    seen: list[tuple[int, float]] = []
    run = Run(options, images_for(options))

    def rate() -> float:
        return float(run.optimizer.param_groups[0]["lr"])

    rates: list[float] = []
    for _ in range(3):
        run.epoch(lambda: rates.append(rate()), lambda iteration, model: seen.append((iteration, rate())))
    # The first epoch's rate is the plan's; the others are seen after the schedule went on.
    assert rates[:9] == [0.1] * 9
    cycle = [0.04, 0.03, 0.02, 0.01]
    assert rates[10:] == pytest.approx((cycle * 6)[1:21])
    assert [iteration for iteration, _ in seen] == [14, 18, 22, 26, 30]
    assert [rate for _, rate in seen] == pytest.approx([0.01] * 5)
    assert run.averages.swa is not None
    assert run.averages.swa.n_averaged == 5


def test_amp_and_channels_last(tmp_path: Path) -> None:
    options = Options.of("digits", epochs=2, swa=True, swa_start=1, ema_decay=0.9, amp=True, channels_last=True)
    dtypes: set[torch.dtype] = set()
    formats: set[bool] = set()

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dtypes.add(output.dtype)
        formats.add(inputs[0].is_contiguous(memory_format=torch.channels_last))

    run = Run(options, images_for(options))
    layer = run.model.features[1].conv1
    layer.register_forward_hook(look)
    plain = train(Options.of("digits", epochs=2, swa=True, swa_start=1, ema_decay=0.9), images_for(options))
    mixed = train(options, images_for(options))
    run.epoch(lambda: None)
    assert dtypes == {torch.bfloat16}
    assert formats == {True}
    assert layer.weight.dtype == torch.float32
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    # bfloat16 keeps 8 bits, and the losses of the first epoch's batches are of order 1.
    assert mixed.rows[0].train_loss != plain.rows[0].train_loss
    assert mixed.rows[0].train_loss == pytest.approx(plain.rows[0].train_loss, rel=0.1)


SCORES = """
import torch
from benchmarks.training.loop import images_for, train
from benchmarks.training.options import Options

torch.set_num_threads(1)
options = Options.of("digits", epochs=6, double=True, swa=True, swa_start=4, swag=True, swag_samples=3)
for name, score in train(options, images_for(options)).scores.items():
    print(name, score.loss)
"""


def test_in_float64_a_run_does_not_depend_on_how_a_processor_rounds() -> None:
    def scores(**environment: str) -> dict[str, float]:
        program = [sys.executable, "-c", SCORES]
        result = subprocess.run(program, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        return {name: float(loss) for name, loss in map(str.split, result.stdout.splitlines())}

    # The code of torch, oneDNN and MKL for other processors, which sums in another order.
    here, elsewhere = scores(), scores(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="SSE41", MKL_CBWR="COMPATIBLE")
    assert here.keys() == elsewhere.keys() == {"sgd", "swa", "swag"}
    # 60 iterations turn the 2^-24 of float32 into a difference of 1e-3 and more, so they magnify 2^-53 to 1e-11 or so.
    # SWAG's samples add float32 normal numbers, which differ by 6e-8 and move a loss by less.
    assert elsewhere == pytest.approx(here, rel=1e-8)


def test_double_is_everywhere() -> None:
    options = Options.of(
        "digits", epochs=2, double=True, swa=True, swa_start=1, swag=True, swag_samples=2, ema_decay=0.9
    )
    run = train(options, images_for(options))
    assert run.averages.swa is not None
    assert run.averages.ema is not None
    assert run.averages.swag is not None
    held = [run.model.state_dict(), run.averages.swa.module.state_dict(), run.averages.ema.module.state_dict()]
    held += [run.averages.swag.state_dict()["mean"]]
    dtypes = {tensor.dtype for state in held for tensor in state.values() if tensor.is_floating_point()}
    assert dtypes == {torch.float64}
    images, _ = next(iter(augmentation.training_batches(images_for(options), 16, 0, 1)))
    assert images.dtype == torch.float64


def test_cifar_networks_train_on_enlarged_digits() -> None:
    options = Options.of("digits", "preresnet20", epochs=1, batch_size=80)
    run = train(options, images_for(options))
    assert run.rows[0].train_loss > 0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "diverged"
    assert main(["train", "--epochs", "2", "--lr-init", "1e30", "--output", str(folder)]) == 1
    assert "the loss is nan in epoch 1: lower lr_init" in capsys.readouterr().err
    assert not (folder / checkpoint.NAME).exists()


@pytest.mark.parametrize("name", ["training.options", "training.plan", "training.loop", "train"])
def test_examples_in_docstrings_run(name: str) -> None:
    found = doctest.testmod(import_module(f"benchmarks.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
