"""Averages of sharded models saved and loaded, run by processes of test_sharded_state.py."""

from __future__ import annotations

import io
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import distribute_tensor as distribute

from fastswa import EMA, WeightAverages, shards
from tests.processes import Ranks
from tests.sharded_models import (
    RULES,
    Transformer,
    assert_equal,
    assert_same_averages,
    collectives,
    fsdp,
    line,
    transformer,
    whole,
    write,
)

STEPS, SAVED_AT = 9, 5


def models() -> list[dict[str, Tensor]]:
    """The models of a run, the same in every process however many there are."""
    generator = torch.Generator().manual_seed(1)

    def another(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 1

    found = [{name: another(tensor) for name, tensor in transformer().state_dict().items()} for _ in range(STEPS)]
    for model in found:
        model["head.weight"] = model["embedding.weight"]
    return found


def averaged(model: nn.Module, steps: slice, averages: WeightAverages | None = None) -> WeightAverages:
    """Averages of some of the models, which the given module takes one after another."""
    averages = averages or WeightAverages(model, RULES)
    for values in models()[steps]:
        write(model, values)
        averages.update()
    return averages


def sharded(ranks: Ranks) -> Transformer:
    """The transformer, sharded over all ranks."""
    return fsdp(transformer(), line(ranks.world))


def grid(ranks: Ranks) -> Transformer:
    """The transformer, replicated over two halves of the ranks and sharded within each."""
    return fsdp(transformer(), init_device_mesh("cpu", (2, ranks.world // 2), mesh_dim_names=("replicate", "shard")))


def case_saved_by_some_ranks_and_loaded_by_others(ranks: Ranks) -> None:
    # The four ranks come first, and save.
    if ranks.world == 4:
        averages = averaged(sharded(ranks), slice(SAVED_AT))
        checkpoint.save(averages.state_dict(), checkpoint_id=ranks.directory / "checkpoint")
    for shard in (sharded, grid):
        model = shard(ranks)
        resumed = WeightAverages(model, RULES)
        state = resumed.state_dict()
        checkpoint.load(state, checkpoint_id=ranks.directory / "checkpoint")
        resumed.load_state_dict(state)
        averaged(model, slice(SAVED_AT, None), resumed)
        assert_same_averages(resumed, averaged(transformer(), slice(None)), ranks.rank)


def case_a_checkpoint_takes_the_averages_themselves(ranks: Ranks) -> None:
    # As torch's Stateful, beside the model.
    model = sharded(ranks)
    averages = averaged(model, slice(SAVED_AT))
    kept = averages.weights("ema")
    checkpoint.save({"averages": averages}, checkpoint_id=ranks.directory / "stateful")
    other = WeightAverages(model, RULES)
    checkpoint.load({"averages": other}, checkpoint_id=ranks.directory / "stateful")
    assert other.n_averaged == averages.n_averaged
    assert_equal(local(other.weights("ema")), local(kept))


def case_whole_weights_are_gathered_one_by_one(ranks: Ranks) -> None:
    model = sharded(ranks)
    averages = averaged(model, slice(3))
    made: list[weakref.ref[Tensor]] = []
    together: list[int] = []

    def gathered(tensor: Tensor) -> Tensor:
        together.append(sum(reference() is not None for reference in made))
        result = gather(tensor)
        made.extend([weakref.ref(result)] if isinstance(tensor, DTensor) else [])
        return result

    gather = shards.gathered
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "gathered", gathered)
        count = collectives(lambda: averages.weights("ema", full=True))
    # The tied one once; no other is whole while the next is gathered.
    assert count == len(made) == len(list(model.parameters()))
    assert set(together) == {0}


def case_a_state_is_the_averages_own_memory(ranks: Ranks) -> None:
    model = sharded(ranks)
    averages = averaged(model, slice(3))
    state = averages.state_dict()["averages"]["ema"][0]
    for name, parameter in model.named_parameters():
        tensor = state[name]
        assert (tensor.shape, tensor.placements) == (parameter.shape, parameter.placements)
        tensor.to_local().fill_(7)
    assert all((whole(averages.weights("ema")[name]) == 7).all() for name, _ in model.named_parameters())


def case_each_rank_may_save_its_own(ranks: Ranks) -> None:
    model = sharded(ranks)
    averages = averaged(model, slice(3))
    file = io.BytesIO()
    torch.save(averages.state_dict(), file)
    file.seek(0)
    other = WeightAverages(model, RULES)
    other.load_state_dict(torch.load(file, weights_only=False))
    assert_equal(local(other.weights("ema")), local(averages.weights("ema")))


def case_whole_averages_are_cut(ranks: Ranks) -> None:
    alone = averaged(transformer(), slice(SAVED_AT))
    for shard in (sharded, grid):
        model = shard(ranks)
        averages = WeightAverages(model, RULES)
        averages.load_state_dict(alone.state_dict())
        averaged(model, slice(SAVED_AT, None), averages)
        assert_same_averages(averages, averaged(transformer(), slice(None)), ranks.rank)


def case_a_state_that_is_placed_otherwise_is_refused(ranks: Ranks) -> None:
    model = sharded(ranks)
    averages = averaged(model, slice(3))
    kept = averages.weights("ema")
    with pytest.raises(ValueError, match=r"'.*' of the average 'swa' is sharded otherwise in the file"):
        averages.load_state_dict(WeightAverages(grid(ranks), RULES).state_dict())
    with pytest.raises(
        ValueError, match=r"sharded otherwise in the file than here; torch\.distributed\.checkpoint can"
    ):
        WeightAverages(transformer(), RULES).load_state_dict(averages.state_dict())
    assert_equal(local(averages.weights("ema")), local(kept))


def case_tensors_that_were_added_or_placed_anew_begin_anew(ranks: Ranks) -> None:
    mesh = line(ranks.world)
    first = torch.arange(6.0).view(3, 2)
    tensors = {name: distribute(first, mesh, [Shard(0)]) for name in ("stays", "moves")}
    averages = WeightAverages(tensors, EMA(0.5))
    averages.update()
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.to_local().add_(2)
    averages.update()
    tensors["moves"] = distribute(whole(tensors["moves"]), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="'moves' is placed on the processes otherwise than before; accept it by"):
        averages.update()
    averages.refresh()
    found = averages.weights(full=True)
    if ranks.rank == 0:
        assert_equal(found, {"stays": first + 1, "moves": first + 2})


def local(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this rank holds."""
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
