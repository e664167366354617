"""Ranks that disagree or fail, run by processes of test_sharded.py: all of them end with an error."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor

from fastswa import EMA, LAWA, SWA, WeightAverages, average_across_ranks_
from tests.processes import Ranks
from tests.sharded_models import assert_equal, collectives, fsdp, line, transformer


def error_of(work: Callable[[], object]) -> str:
    """The error that something raises."""
    with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
        work()
    return f"{type(caught.value).__name__}: {caught.value}"


def assert_same_on_all(ranks: Ranks, error: str, expected: str) -> None:
    """All ranks must have seen the same error."""
    errors: list[str | None] = [None] * ranks.world
    distributed.all_gather_object(errors, error)
    assert errors == [expected] * ranks.world


def case_ranks_with_other_rules(ranks: Ranks) -> None:
    model = fsdp(transformer(), line(ranks.world))
    last = ranks.world - 1
    rules = {"ema": EMA(0.9 if ranks.rank < last else 0.99)}
    error = error_of(lambda: WeightAverages(model, rules))
    told = f"the rule of 'ema' is EMA(decay=0.9) on rank 0 and EMA(decay=0.99) on rank {last}"
    assert_same_on_all(ranks, error, f"ValueError: WeightAverages: the ranks disagree; {told}")
    averages = WeightAverages(model, rules, check_ranks=False)
    assert collectives(averages.update) == 0


def case_ranks_with_other_tensors(ranks: Ranks) -> None:
    last = ranks.world - 1
    bias = torch.ones(3 + (ranks.rank == last))
    error = error_of(lambda: WeightAverages({"weight": torch.ones(2), "bias": bias}, SWA(), check_ranks=True))
    told = f"'bias' is averaged torch.float32 (3,) on rank 0 and averaged torch.float32 (4,) on rank {last}"
    assert_same_on_all(ranks, error, f"ValueError: WeightAverages: the ranks disagree; {told}")
    name = "last" if ranks.rank == last else "other"
    error = error_of(
        lambda: WeightAverages({name: torch.ones(2)}, SWA(), check_ranks=distributed.group.WORLD),
    )
    told = f"'other' is averaged torch.float32 (2,) on rank 0 and missing on rank {last}"
    assert_same_on_all(ranks, error, f"ValueError: WeightAverages: the ranks disagree; {told}")


def case_ranks_that_go_on_from_other_counts(ranks: Ranks) -> None:
    model = fsdp(transformer(), line(ranks.world))
    averages = WeightAverages(model, SWA())
    kept = {name: part.to_local().clone() for name, part in averages.state_dict()["averages"]["average"][0].items()}
    state = deepcopy(averages.state_dict())
    state["counters"]["step"] += ranks.rank
    for part in state["averages"]["average"][0].values():
        part.to_local().add_(1)
    error = error_of(lambda: averages.load_state_dict(state))
    counts = [f"the count is {{'step': {step}, 'n_averaged': {{'average': 0}}}} on rank {step}" for step in (0, 1)]
    told = f"{counts[0]} and {counts[1].removeprefix('the count is ')}"
    assert_same_on_all(ranks, error, f"ValueError: load_state_dict: the ranks disagree; {told}")
    now = {name: part.to_local() for name, part in averages.state_dict()["averages"]["average"][0].items()}
    assert_equal(now, kept)


def case_a_rank_that_fails_tells_the_others(ranks: Ranks) -> None:
    model = fsdp(transformer(), line(ranks.world))
    failing = ranks.rank == 1
    error = error_of(lambda: WeightAverages(model, SWA(), include="nothing" if failing else None))
    told = "ValueError: no tensor is averaged; look at include, exclude and trainable_only"
    assert error == (told if failing else f"RuntimeError: WeightAverages failed on rank 1: {told}")

    averages = WeightAverages(model, SWA())
    state = averages.state_dict()
    error = error_of(lambda: averages.load_state_dict({**state, "seed": 1} if failing else state))
    told = "ValueError: the saved averages are others: the seed of stochastic rounding is 1 in the file and None here"
    assert error == (told if failing else f"RuntimeError: load_state_dict failed on rank 1: {told}")


def case_every_dimension_of_a_mesh_is_asked(ranks: Ranks) -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, ranks.world // 2), mesh_dim_names=("a", "b"))
    model = fsdp(transformer(), mesh)
    # Rank 0 shares neither row nor column with the last of four.
    last = ranks.world - 1
    error = error_of(lambda: WeightAverages(model, LAWA(3 if ranks.rank == last else 2)))
    told = f"the rule of 'average' is LAWA(window=2) on rank 0 and LAWA(window=3) on rank {last}"
    assert_same_on_all(ranks, error, f"ValueError: WeightAverages: the ranks disagree; {told}")


def case_the_mesh_of_most_ranks_is_asked(ranks: Ranks) -> None:
    # As experts are placed: some tensors on a few ranks each, of which the last rank's know nothing of the first's.
    pairs = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks.world // 2, 2), mesh_dim_names=("a", "b"))
    last = ranks.world - 1
    tensors = {
        name: distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        for name, mesh in (("expert", pairs["b"]), ("dense", line(ranks.world)))
    }
    error = error_of(lambda: WeightAverages(tensors, EMA(0.9 if ranks.rank < last else 0.99)))
    told = f"the rule of 'average' is EMA(decay=0.9) on rank 0 and EMA(decay=0.99) on rank {last}"
    assert_same_on_all(ranks, error, f"ValueError: WeightAverages: the ranks disagree; {told}")


def case_one_rank_alone_asks_nobody(ranks: Ranks) -> None:
    if ranks.rank == 0:
        model = nn.Linear(3, 2)
        averages = WeightAverages(model, SWA())
        averages.update()
        averages.load_state_dict(averages.state_dict())


def case_check_ranks_is_checked(ranks: Ranks) -> None:
    with pytest.raises(TypeError, match="check_ranks must be True, False, None or a ProcessGroup, got 'all'"):
        WeightAverages(nn.Linear(3, 2), SWA(), check_ranks="all")


def case_the_mean_over_ranks_is_refused_together(ranks: Ranks) -> None:
    last = ranks.world - 1
    model = nn.Linear(3, 2 + (ranks.rank == last))
    kept = deepcopy(model.state_dict())
    error = error_of(lambda: average_across_ranks_(model))
    told = f"'weight' is torch.float32 (2, 3) on rank 0 and torch.float32 (3, 3) on rank {last}"
    assert_same_on_all(ranks, error, f"ValueError: average_across_ranks_: the ranks disagree; {told}")
    for weight, told in (
        (-1.0, "weights must be a finite number of at least 0, got -1.0"),
        (float("nan"), "weights must be a finite number of at least 0, got nan"),
    ):
        error = error_of(lambda weight=weight: average_across_ranks_(model, None, weight if ranks.rank == 1 else 1.0))
        told = f"ValueError: {told}"
        assert error == (told if ranks.rank == 1 else f"RuntimeError: average_across_ranks_ failed on rank 1: {told}")
    whole = nn.Linear(3, 2)
    error = error_of(lambda: average_across_ranks_(whole, None, 0.0))
    assert_same_on_all(ranks, error, "ValueError: weights are 0 on all ranks")
    error = error_of(lambda: average_across_ranks_(fsdp(transformer(), line(ranks.world))))
    assert error.startswith("TypeError: 'embedding.weight' is a DTensor, placed as (Shard(dim=0),): the ranks share it")
    pair = distributed.new_group([0, 1])
    if ranks.rank > 1:
        assert error_of(lambda: average_across_ranks_(model, pair)).startswith("RuntimeError: rank")
    assert_equal(model.state_dict(), kept)
