"""Predictions averaged over samples, against the same average by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastswa import SWAG, average_predictions, update_bn
from tests.models import ConvNet
from tests.swag import same, trained, values

SAMPLES = 4


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def images() -> list[Tensor]:
    return [torch.randn(size, 1, 8, 8) for size in (6, 6, 3)]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"diagonal_only": True}], ids=str)
def test_the_average_is_that_of_the_samples(options: dict[str, object]) -> None:
    model = perceptron()
    swag, data = trained(model), images()
    before = values(model)
    model.train()
    model[1].eval()
    ours = average_predictions(swag, data, SAMPLES, generator=seeded(), **options)
    assert same(values(model), before)
    assert [part.training for part in model] == [True, False, True, True, True]
    other, generator, expected = perceptron().eval(), seeded(), []
    for _ in range(SAMPLES):
        swag.sample_(other, generator=generator, **options)
        with torch.no_grad():
            expected.append(torch.cat([other(batch) for batch in data]).double().softmax(1))
    assert ours.dtype == torch.float64
    # The logits are the same float32 numbers; the rest is float64.
    assert torch.allclose(ours, torch.stack(expected).mean(0), rtol=1e-12, atol=0)
    assert not torch.allclose(ours, expected[0], rtol=1e-2, atol=0)


def test_statistics_are_recomputed_for_each_sample() -> None:
    model = ConvNet()
    swag, data, training = trained(model), images(), images()
    before = values(model)
    ours = average_predictions(swag, data, SAMPLES, bn_loader=training, generator=seeded())
    assert same(values(model), before)
    other, generator, expected = ConvNet(), seeded(), []
    for _ in range(SAMPLES):
        swag.sample_(other, generator=generator)
        update_bn(training, other, estimator="weighted")
        with torch.no_grad():
            expected.append(torch.cat([other.eval()(batch) for batch in data]).double().softmax(1))
        other.train()
    assert torch.allclose(ours, torch.stack(expected).mean(0), rtol=1e-12, atol=0)
    with pytest.warns(UserWarning, match="pass training data as bn_loader"):
        stale = average_predictions(swag, data, SAMPLES, generator=seeded())
    assert not torch.allclose(ours, stale, rtol=1e-2, atol=0)


def test_outputs_and_batches_of_other_kinds() -> None:
    model = nn.Linear(4, 2)
    swag = trained(model)
    data = [{"x": torch.randn(3, 4), "name": "first"}, {"x": torch.randn(2, 4), "name": "last"}]
    options = {"forward": lambda model, batch: model(batch["x"]), "generator": seeded()}
    ours = average_predictions(swag, data, SAMPLES, activation=None, **options)
    other, generator, weights = nn.Linear(4, 2), seeded(), []
    for _ in range(SAMPLES):
        swag.sample_(other, generator=generator)
        weights.append([tensor.detach().double().clone() for tensor in other.parameters()])
    weight, bias = (torch.stack(tensors).mean(0) for tensors in zip(*weights, strict=True))
    exact = torch.cat([batch["x"] for batch in data]).double() @ weight.T + bias
    # A linear model's mean prediction is that of the mean weights; the model computes it in float32.
    assert torch.allclose(ours, exact, rtol=0, atol=1e-5)
    bare = {"forward": lambda model, batch: (model(batch["x"]),)}
    with pytest.raises(TypeError, match="the model returned tuple, not a tensor; pass forward="):
        average_predictions(swag, data, SAMPLES, **bare)


def test_the_output_is_not_written_to() -> None:
    model = nn.ParameterDict({"unused": nn.Parameter(torch.zeros(1))})
    swag, batch = trained(model), torch.ones(2, 3, dtype=torch.float64)
    average = average_predictions(swag, [batch], SAMPLES, forward=lambda _, batch: batch, activation=None)
    assert torch.equal(batch, torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(average, batch)


class Shrinking:
    """Gives a batch less each time it is run through."""

    def __init__(self, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.data, self.change = images(), change

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.data
        self.data = self.change(self.data)


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1], lambda data: [*data, data[0]], lambda data: data[::-1], lambda data: []],
    ids=["fewer", "more", "in another order", "none"],
)
def test_a_loader_that_gives_other_batches(change: Callable[[list[Tensor]], list[Tensor]]) -> None:
    model = perceptron()
    swag = trained(model)
    before = values(model)
    with pytest.raises(ValueError, match=r"gave no batches|gave other batches for sample 2 than for the first"):
        average_predictions(swag, Shrinking(change), SAMPLES)
    assert same(values(model), before)


def dataset(**options: object) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(9, 1, 8, 8), torch.arange(9)), batch_size=4, **options)


def test_what_is_refused_before_anything_is_done() -> None:
    model = perceptron()
    swag = trained(model)
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(range(9)), 4, False)
    shuffled = DataLoader(TensorDataset(torch.randn(9, 1, 8, 8)), batch_sampler=sampler)
    for loader in (dataset(shuffle=True), shuffled):
        with pytest.raises(ValueError, match="the loader shuffles"):
            average_predictions(swag, loader, SAMPLES)
    with pytest.raises(ValueError, match="loader is run through for each sample, but it is an iterator"):
        average_predictions(swag, iter(images()), SAMPLES)
    with pytest.raises(ValueError, match="bn_loader is run through for each sample, but it is an iterator"):
        average_predictions(swag, images(), SAMPLES, bn_loader=iter(images()))
    with pytest.raises(ValueError, match="samples must be an int of at least 1, got 0"):
        average_predictions(swag, images(), 0)
    with pytest.raises(ValueError, match="the loader gave no batches"):
        average_predictions(swag, [], SAMPLES)
    with pytest.raises(RuntimeError, match="two models at least"):
        average_predictions(SWAG(model), images(), SAMPLES)
    with pytest.raises(TypeError, match="follows tensors without a module"):
        average_predictions(SWAG({"x": torch.zeros(2)}), images(), SAMPLES)
    assert average_predictions(swag, dataset(), SAMPLES).shape == (9, 3)
    assert average_predictions(swag, iter(images()), 1).shape == (15, 3)


def test_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = perceptron()
    swag = trained(model)
    average_predictions(swag, images(), SAMPLES, progress=True)
    assert "samples: 100%" in capsys.readouterr().err
    average_predictions(swag, images(), SAMPLES)
    assert not capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install fastswa\[progress\]"):
        average_predictions(swag, images(), SAMPLES, progress=True)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = ConvNet()
    swag = trained(model)
    before = values(model)

    def breaking() -> Iterator[Tensor]:
        yield images()[0]
        raise OSError("disk")

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            return breaking()

    for options in ({"loader": Loader(), "bn_loader": images()}, {"loader": images(), "bn_loader": Loader()}):
        with pytest.raises(OSError, match="disk"):
            average_predictions(swag, samples=SAMPLES, **options)
        assert same(values(model), before)
        assert all(part.training for part in model.modules())
        swag.collect()
