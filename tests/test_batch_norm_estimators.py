"""Estimators, sweeps and early stopping, against float64 computations of their own."""

from __future__ import annotations

from copy import deepcopy
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastswa
import fastswa_kernels.batch_norm
from fastswa import backends
from tests.batch_norm import NETWORKS, Net, Residual, assert_statistics_close, batches, norms, statistics, trained


def authors_rule(data: list[Tensor], model: nn.Module) -> None:
    """Recompute statistics as the paper's authors do: a momentum of b / (n + b), n being the samples so far."""
    for layer in norms(model):
        layer.reset_running_stats()
    model.train()
    n = 0
    for batch in data:
        for layer in norms(model):
            layer.momentum = len(batch) / (n + len(batch))
        model(batch)
        n += len(batch)


@pytest.mark.parametrize("engine", ["eager", "merge"])
@pytest.mark.parametrize("network", NETWORKS[1:])
def test_weighted_is_the_authors_rule(network: type[nn.Module], engine: str) -> None:
    sizes = (8, 8, 3, 16, 2)
    data = [torch.randn(size, 1, 5, 5) * (1 + number) + number for number, size in enumerate(sizes)]
    ours = trained(network())
    theirs = deepcopy(ours)
    fastswa.update_bn(data, ours, estimator="weighted", engine=engine)
    with torch.no_grad():
        authors_rule(data, theirs)
    # The bound that was asked for; a handful of float32 roundings in either.
    assert_statistics_close(ours, statistics(theirs), 1e-6)
    assert all(int(layer.num_batches_tracked) == len(sizes) for layer in norms(ours))


def inputs_of(model: nn.Module, layers: list[_BatchNorm], data: list[Tensor]) -> list[list[Tensor]]:
    """What reaches each layer in a pass, in float64, one list of calls a layer, channels last."""
    seen: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, x, calls=calls: calls.append(x[0].double().transpose(1, -1).reshape(-1, x[0].shape[1]))
        )
        for layer, calls in zip(layers, seen, strict=True)
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


def pooled(calls: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all values together."""
    var, mean = torch.var_mean(torch.cat(calls), 0, correction=0)
    return mean, var


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", NETWORKS)
def test_population_pools_all_values(network: type[nn.Module], dtype: torch.dtype) -> None:
    data = [batch.to(dtype) for batch in batches()]
    model = trained(network()).to(dtype)
    reference = deepcopy(model).train()
    torch.manual_seed(1)  # dropout
    expected = [pooled(calls) for calls in inputs_of(reference, norms(reference), data)]
    torch.manual_seed(1)
    report = fastswa.update_bn(data, model, estimator="population")
    # Each batch's mean and variance come from BatchNorm's own kernel, in the model's dtype; merging adds nothing.
    assert_statistics_close(model, expected, 2e-6 if dtype == torch.float32 else 1e-13)
    assert report.batches == 5
    if network is Net:
        assert int(model.shared.num_batches_tracked) == 10


@pytest.mark.parametrize("engine", ["eager", "merge"])
def test_a_layer_that_is_called_twice_counts_both_calls(engine: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) * 2 + 1)

    sizes = (8, 4, 4, 16)
    data = [torch.randn(size, 3) + number for number, size in enumerate(sizes)]
    for estimator in ("torch", "weighted"):
        model = Twice()
        reference = Twice().train()
        calls = inputs_of(reference, [reference.norm], data)[0]
        weights = torch.tensor([1 if estimator == "torch" else size for size in sizes for _ in range(2)]).double()
        weights = (weights / weights.sum())[:, None]
        expected = [
            (
                (weights * torch.stack([call.mean(0) for call in calls])).sum(0),
                (weights * torch.stack([call.var(0) for call in calls])).sum(0),
            )
        ]
        fastswa.update_bn(data, model, estimator=estimator, engine=engine)
        # A few float32 roundings.
        assert_statistics_close(model, expected, 1e-6)
        assert int(model.norm.num_batches_tracked) == 8


def layer_sequential(model: nn.Module, data: list[Tensor], depth: int) -> list[tuple[Tensor, Tensor]]:
    """The exact statistics of the first layers in depth: each from inputs made with exact ones before it."""
    exact = deepcopy(model).double().eval()
    found = []
    for layer in norms(exact)[:depth]:
        mean, var = pooled(inputs_of(exact, [layer], [batch.double() for batch in data])[0])
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        found.append((mean, var))
    return found


@pytest.mark.parametrize("estimator", ["torch", "population"])
def test_as_many_sweeps_as_layers_are_exact_on_a_sorted_loader(estimator: str) -> None:
    # Every batch from another end of the data, as a loader sorted by class gives them.
    data = [torch.randn(12, 1, 5, 5) * (1 + number) + 3 * number for number in range(6)]
    model = trained(Residual())
    expected = layer_sequential(model, data, depth=4)
    for sweeps in range(5):
        ours = deepcopy(model)
        report = fastswa.update_bn(data, ours, estimator=estimator, sweeps=sweeps)
        reached = nn.Sequential(*norms(ours)[:sweeps])
        # The bound that was asked for: float32 activations through four layers. Sweep k makes the k-th layer exact.
        assert_statistics_close(reached, expected[:sweeps], 1e-5)
        assert int(ours.norms[0].num_batches_tracked) == report.batches == 6
    # One sweep is not enough, so the bound above says something.
    once = deepcopy(model)
    fastswa.update_bn(data, once, sweeps=1)
    with pytest.raises(AssertionError):
        assert_statistics_close(once, expected, 1e-2)


def test_a_layer_used_in_training_only_keeps_its_pass_through_sweeps() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.auxiliary = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.auxiliary(self.trunk(x)) if self.training else self.trunk(x)

    data = [torch.randn(8, 3) for _ in range(4)]
    plain, swept = Auxiliary(), Auxiliary()
    fastswa.update_bn(data, plain)
    report = fastswa.update_bn(data, swept, sweeps=2)
    assert torch.equal(swept.auxiliary.running_var, plain.auxiliary.running_var)
    # The trunk's input is the data itself: pooled, not torch's mean of batch variances.
    assert_statistics_close(nn.Sequential(swept.trunk), [pooled([batch.double() for batch in data])], 1e-6)
    assert report.layers == ("trunk", "auxiliary")


def standard_errors(data: list[Tensor]) -> float:
    """The worst over the channels, from the batches' means and unbiased variances."""
    means = torch.stack([batch.double().mean(0) for batch in data])
    variances = torch.stack([batch.double().var(0) for batch in data])
    count = len(data) ** 0.5
    of_mean = means.std(0) / count / variances.mean(0).sqrt()
    of_var = variances.std(0) / count / variances.mean(0)
    return float(torch.maximum(of_mean, of_var).max())


def test_the_standard_error_and_the_early_stop() -> None:
    data = [torch.randn(32, 5) * 3 + 1 for _ in range(400)]
    full = fastswa.update_bn(data, nn.BatchNorm1d(5), engine="merge")
    # Batch statistics in float32.
    assert full.worst_standard_error == pytest.approx(standard_errors(data), rel=1e-5)
    stopped = []
    for rtol in (0.1, 0.05, 0.02):
        model = nn.BatchNorm1d(5)
        report = fastswa.update_bn(iter(data), model, rtol=rtol, min_batches=4)
        stopped.append(report.batches)
        assert report.batches >= 4
        assert report.worst_standard_error <= rtol
        # It looks every 8 batches, and no earlier look would have done.
        assert (report.batches - 4) % 8 == 0
        assert all(standard_errors(data[:count]) > rtol for count in range(4, report.batches, 8))
        # Four standard errors from the truth.
        assert_statistics_close(model, [(torch.ones(5).double(), torch.full((5,), 9.0).double())], 4 * rtol)
    assert stopped == sorted(stopped)
    assert 4 <= stopped[0] < stopped[-1] < 400
    assert fastswa.update_bn(data, nn.BatchNorm1d(5), rtol=1e-9).batches == 400


def test_constant_channels_do_not_hold_the_stop_up() -> None:
    model = nn.BatchNorm1d(2)
    data = [torch.stack([torch.randn(32), torch.full((32,), 7.0)], 1) for _ in range(400)]
    report = fastswa.update_bn(data, model, rtol=0.05)
    assert report.batches < 400
    assert (model.running_mean[1], model.running_var[1]) == (7, 0)


def test_spoilt_statistics_end_the_pass_early() -> None:
    read = []

    def loader():
        for number in range(400):
            read.append(number)
            yield torch.full((4, 3), float("nan")) if number == 20 else torch.randn(4, 3)

    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="the statistics of 1 are not finite"):
        fastswa.update_bn(loader(), model, engine="merge")
    assert len(read) < 40
    assert torch.equal(model[1].running_var, torch.ones(3))


def test_layers_of_several_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.single, self.double_norm = nn.BatchNorm1d(3), nn.BatchNorm1d(70).double()
            self.half_norm = nn.BatchNorm1d(3).bfloat16()

        def forward(self, x: Tensor) -> None:
            self.single(x)
            self.double_norm(x.double().repeat(1, 24)[:, :70])
            self.half_norm(x.bfloat16())

    data = [torch.randn(16, 3) + number for number in range(5)]
    model = Mixed()
    fastswa.update_bn(data, model)
    mean = torch.stack([batch.double().mean(0) for batch in data]).mean(0)
    var = torch.stack([batch.double().var(0) for batch in data]).mean(0)
    wide = [tensor.repeat(24)[:70] for tensor in (mean, var)]
    assert_statistics_close(nn.Sequential(model.single), [(mean, var)], 1e-6)
    assert_statistics_close(nn.Sequential(model.double_norm), [(wide[0], wide[1])], 1e-13)
    # The input's own rounding to bfloat16, and one at the store.
    assert_statistics_close(nn.Sequential(model.half_norm), [(mean, var)], 2**-6)


def test_float64_merging_does_not_drift() -> None:
    count = 4000
    data = torch.randn(count, 4, 1) * (1 + torch.arange(count)[:, None, None] / count)
    expected = [(data.double().mean(1).mean(0), data.double().var(1).mean(0))]
    merged, recursive = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    fastswa.update_bn(data.unbind(), merged, engine="merge")
    fastswa.update_bn(data.unbind(), recursive, engine="eager")
    # One float32 rounding at the store, and the batches' own, which average out.
    assert_statistics_close(merged, expected, 3e-7)
    with pytest.raises(AssertionError):
        assert_statistics_close(recursive, expected, 3e-7)


@pytest.mark.parametrize(
    "options", [{"engine": "merge"}, {"estimator": "population"}, {"sweeps": 2}, {"rtol": 0.5, "min_batches": 2}]
)
def test_the_triton_kernels_give_what_torch_gives(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches()
    model = trained(Residual())
    expected = deepcopy(model)
    by_torch = fastswa.update_bn(data, expected, **options)
    used = []

    def kernels(device: torch.device) -> ModuleType:
        used.append(device)
        return fastswa_kernels.batch_norm

    # In the interpreter, as a GPU would run them.
    monkeypatch.setattr(backends, "batch_norm_kernels", kernels)
    by_triton = fastswa.update_bn(data, model, **options)
    assert used
    # float64 merges; a sweep takes statistics in float32, right to 1e-6.
    assert_statistics_close(model, statistics(expected), 2e-6)
    assert by_triton.batches == by_torch.batches
    if by_torch.worst_standard_error is None:
        assert by_triton.worst_standard_error is None
    else:
        assert by_triton.worst_standard_error == pytest.approx(by_torch.worst_standard_error, rel=1e-9)
