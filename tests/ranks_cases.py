"""Ranks that hold whole models: DistributedDataParallel, and training alone with a mean at the end."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

import fastswa
from fastswa import EMA, LAWA, SWA, AveragedModel, WeightAverages, average_across_ranks_
from tests.batch_norm import Residual, assert_statistics_close, batches, statistics
from tests.models import ComplexNet, ConvNet, TiedNet, train_step
from tests.processes import Ranks
from tests.sharded_models import assert_equal, assert_follows, collectives, line, training, transformer, whole


def everyones(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """A tensor of every rank."""
    found = [torch.empty_like(tensor) for _ in range(ranks.world)]
    distributed.all_gather(found, tensor.contiguous())
    return found


def assert_equal_on_all_ranks(tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Every rank must hold the same bits."""
    for name, tensor in tensors.items():
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        assert all(torch.equal(real, other) for other in everyones(real, ranks)), name


def case_averages_of_distributed_data_parallel(ranks: Ranks) -> None:
    model = DistributedDataParallel(transformer())
    averages = assert_follows(model, transformer(), ranks.rank, 3, check_ranks=True)
    assert averages.weights("ema").keys() == transformer().state_dict().keys()
    assert_equal_on_all_ranks(averages.weights("ema"), ranks)


def case_averaged_model_of_distributed_data_parallel(ranks: Ranks) -> None:
    for wrap in (DistributedDataParallel, lambda model: torch.compile(model, backend="eager")):
        model = wrap(transformer())
        ours, theirs, plain = AveragedModel(model), swa_utils.AveragedModel(model), AveragedModel(transformer())
        assert list(ours.state_dict()) == list(theirs.state_dict())
        step = training(model, ranks.rank)
        for number in range(3):
            step(number)
            for average in (ours, theirs, plain):
                average.update_parameters(model)
        theirs.load_state_dict(ours.state_dict())
        for (name, ema), other in zip(plain.module.named_parameters(), ours.module.parameters(), strict=True):
            assert torch.equal(ema, other), name
        weights = {name.removeprefix("module.").removeprefix("module."): t for name, t in ours.state_dict().items()}
        if wrap is DistributedDataParallel:
            assert_equal_on_all_ranks({name: t for name, t in weights.items() if name != "n_averaged"}, ranks)


def case_averaged_model_of_a_sharded_model_points_elsewhere(ranks: Ranks) -> None:
    model = fully_shard(nn.Linear(3, 2), mesh=line(ranks.world))
    with pytest.raises(RuntimeError, match=r"FSDP does not .* Average it by WeightAverages, .* module=, a"):
        AveragedModel(model)
    # Two sharded models pair by name, part by part.
    other = fully_shard(nn.Linear(3, 2), mesh=line(ranks.world))
    average = AveragedModel(model, multi_avg_fn=EMA(0.5), module=other)
    for _ in range(2):
        average.update_parameters(model)
    assert_equal(*({name: whole(tensor) for name, tensor in each.state_dict().items()} for each in (other, model)))


@dataclass(frozen=True)
class Mean:
    """The weighted mean over ranks of a tensor, and of its magnitude, in float64."""

    exact: Tensor
    magnitude: Tensor

    @classmethod
    def of(cls, tensor: Tensor, ranks: Ranks, weights: list[float] | None = None) -> Mean:
        """Ask every rank."""
        weights = weights or [1.0] * ranks.world
        real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        # A rank without weight counts for nothing, whatever it holds.
        pairs = [(w, other.double()) for w, other in zip(weights, everyones(real, ranks), strict=True) if w]
        total = sum(weights)
        return cls(sum(w * other for w, other in pairs) / total, sum(w * other.abs() for w, other in pairs) / total)

    def assert_close(self, tensor: Tensor, ranks: Ranks) -> None:
        """Half an ulp for a product, ranks - 1 sums, the sum of weights and a quotient, and a rounding at the end."""
        real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        arithmetic = torch.finfo(torch.float64 if real.dtype == torch.float64 else torch.float32).eps
        terms = (ranks.world + 2) / 2 * arithmetic * self.magnitude
        bound = terms + torch.finfo(real.dtype).eps / 2 * (self.exact.abs() + terms)
        assert ((real.double() - self.exact).abs() <= bound).all()


def case_the_mean_over_ranks(ranks: Ranks) -> None:
    some = [1000.0 + 77 * rank for rank in range(ranks.world)]
    for weights in (None, some, [0.0, *some[1:]]):
        for build in (ConvNet, ComplexNet, TiedNet, lambda: ConvNet().bfloat16(), lambda: ConvNet().double()):
            torch.manual_seed(0)
            model = build()
            torch.manual_seed(ranks.rank)
            train_step(model)
            tensors = dict((*model.named_parameters(), *model.named_buffers()))
            floating = {name for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()}
            means = {name: Mean.of(tensors[name], ranks, weights) for name in sorted(floating)}
            kept = {name: tensor.clone() for name, tensor in tensors.items() if name not in floating}
            if weights and weights[ranks.rank] == 0:
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))
            average_across_ranks_(model, None, None if weights is None else weights[ranks.rank])
            for name, mean in means.items():
                mean.assert_close(tensors[name], ranks)
            assert_equal_on_all_ranks({name: tensors[name].detach() for name in sorted(floating)}, ranks)
            assert all(torch.equal(tensors[name], tensor) for name, tensor in kept.items())


def case_the_mean_of_some_ranks(ranks: Ranks) -> None:
    torch.manual_seed(ranks.rank)
    model = nn.Linear(3, 2)
    everyone = {name: everyones(parameter.detach(), ranks) for name, parameter in model.named_parameters()}
    some = [0, ranks.world - 1]
    pair = distributed.new_group(some)
    if ranks.rank in some:
        average_across_ranks_(model, pair)
    for name, parameter in model.named_parameters():
        first, own, last = (everyone[name][rank] for rank in (0, ranks.rank, -1))
        # The sum of two numbers is rounded once, and half of it is exact.
        assert torch.equal(parameter, (first + last) / 2 if ranks.rank in some else own), name


def case_one_all_reduce_for_each_arithmetic(ranks: Ranks) -> None:
    sizes = []

    def counted(flat: Tensor, group: object) -> None:
        sizes.append(len(flat))

    for build, count in ((ConvNet, 1), (lambda: ConvNet().bfloat16(), 1), (ComplexNet, 2), (TiedNet, 1)):
        model = build()
        assert collectives(lambda model=model: average_across_ranks_(model, check_ranks=False)) == count
    # The tied weights once, and the weight of the rank.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "all_reduce", counted)
        average_across_ranks_(model, check_ranks=False)
    assert sizes == [sum(parameter.numel() for parameter in model.parameters()) + 1]


def case_the_mean_of_averages(ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    averages = WeightAverages(model, {"swa": SWA(), "latest": LAWA(2)})
    averaged = AveragedModel(model, multi_avg_fn=EMA(0.5))
    torch.manual_seed(ranks.rank)
    for _ in range(3):
        train_step(model)
        averages.update()
        averaged.update_parameters(model)
    # A window's members one by one: in their mean they may cancel.
    sets = [named for each in averages.state_dict()["averages"].values() for named in each]
    means = [{name: Mean.of(tensor, ranks) for name, tensor in named.items()} for named in sets]
    own = {name: Mean.of(tensor, ranks) for name, tensor in averaged.module.named_parameters()}
    weights = deepcopy(model.state_dict())
    average_across_ranks_(averages)
    average_across_ranks_(averaged)
    for named, targets in zip(sets, means, strict=True):
        for name, tensor in named.items():
            targets[name].assert_close(tensor, ranks)
    for name, tensor in averaged.module.named_parameters():
        own[name].assert_close(tensor, ranks)
    assert_equal(model.state_dict(), weights)
    assert averages.n_averaged == {"swa": 3, "latest": 3}
    assert int(averaged.n_averaged) == 3
    # Both go on from there.
    train_step(model)
    averages.update()
    averaged.update_parameters(model)


def case_statistics_are_those_of_all_data(ranks: Ranks) -> None:
    torch.manual_seed(0)
    # As many batches on every rank, because a sharded model's forward pass is everyone's.
    data = [batch.double() for batch in batches(4 * (8 // ranks.world) * ranks.world)]
    own = data[ranks.rank :: ranks.world]
    alone = Residual().double()
    given = deepcopy(alone)
    world = distributed.group.WORLD
    fastswa.update_bn(data, alone, engine="merge")
    for shard in (DistributedDataParallel, lambda model: fully_shard(model, mesh=line(ranks.world))):
        model = deepcopy(given)
        wrapped = shard(model)
        fastswa.update_bn(own, wrapped, process_group=world)
        found = dict(model.named_buffers())
        assert_equal_on_all_ranks(found, ranks)
        plain = deepcopy(given)
        plain.load_state_dict(found, strict=False)
        # float64 rounding of sums in another order, as in test_batch_norm_group.py.
        assert_statistics_close(plain, statistics(alone), 1e-13)


def case_statistics_of_a_sharded_average(ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = fully_shard(Residual().double(), mesh=line(ranks.world))
    averages = WeightAverages(model, SWA(), dtype=torch.float64)
    averages.update()
    own = [batch.double() for batch in batches(8 * ranks.world)[ranks.rank :: ranks.world]]
    before = deepcopy(dict(model.named_buffers()))
    for sweeps in (0, 1):
        with averages.swapped():
            fastswa.update_bn(own, model, sweeps=sweeps, process_group=distributed.group.WORLD)
            found = dict(model.named_buffers())
            assert_equal_on_all_ranks(found, ranks)
            assert not torch.equal(found["norms.0.running_mean"], before["norms.0.running_mean"])
        assert_equal(dict(model.named_buffers()), before)
    averages.update()
