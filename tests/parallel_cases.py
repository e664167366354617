"""Tensor parallelism, grids of processes, compiled and checkpointed models, run by processes of test_sharded.py."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastswa import EMA, WeightAverages
from tests.processes import Ranks
from tests.sharded_models import (
    Transformer,
    assert_equal,
    assert_follows,
    evaluate,
    fsdp,
    line,
    transformer,
    whole,
    whole_state,
)


def tensor_parallel(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Each block's network cut by columns and rows; the bias of the second half is replicated."""
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def case_tensor_parallel(ranks: Ranks) -> None:
    model = tensor_parallel(transformer(hidden=8), line(ranks.world))
    kinds = {parameter.placements for parameter in model.parameters() if isinstance(parameter, DTensor)}
    assert kinds == {(Shard(0),), (Shard(1),), (Replicate(),)}
    # All ranks see the same data.
    averages = assert_follows(model, transformer(hidden=8), ranks.rank, 4, data=0)
    assert_swaps(model, averages)


def assert_swaps(model: nn.Module, averages: WeightAverages) -> None:
    """Inside `swapped` the model holds an average and can be evaluated; afterwards it holds its own weights."""
    before, average = whole_state(model), {name: whole(part) for name, part in averages.weights("ema").items()}
    with averages.swapped("ema"):
        assert_equal(whole_state(model), average)
        evaluate(model)
    assert_equal(whole_state(model), before)


def case_sharded_and_tensor_parallel(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.world // 2, 2), mesh_dim_names=("shard", "tensor"))
    # Three columns for each of two ranks, which two others cut again.
    model = fsdp(tensor_parallel(transformer(hidden=6), mesh["tensor"]), mesh["shard"])
    assert {parameter.device_mesh.ndim for parameter in model.parameters()} == {1, 2}
    assert_follows(model, transformer(hidden=6), ranks.rank, 4, data=ranks.rank // 2)


def case_replicated_and_sharded(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (2, ranks.world // 2), mesh_dim_names=("replicate", "shard"))
    assert_follows(fsdp(transformer(), mesh), transformer(), ranks.rank, 3)


def case_passes_in_low_precision(ranks: Ranks) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, other = (fsdp(transformer(), line(ranks.world), mp_policy=policy) for _ in range(2))
    averages = assert_follows(model, transformer(), ranks.rank, 3)
    other.load_state_dict(averages.weights("ema"))
    with averages.swapped("ema"):
        found = evaluate(model)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, evaluate(other))


def case_any_placement(ranks: Ranks) -> None:
    mesh = line(ranks.world)
    sizes, places = ((5, 3), (1, 7), (2, 2, 3)), (Shard(0), Shard(1), Replicate())
    tensors = {
        f"{size} {place}": distribute_tensor(torch.randn(size, dtype=dtype), mesh, [place])
        for size in sizes
        for place in places
        for dtype in (torch.float32, torch.complex64)
    }
    tensors["number"] = distribute_tensor(torch.tensor(3.0), mesh, [Replicate()])
    tensors["alone"] = torch.randn(3)
    averages = WeightAverages(tensors, EMA(0.5))
    averages.update()
    first = {name: whole(tensor).clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).mul_(2)
    averages.update()
    found = averages.weights(full=True)
    # Halves and doubles are exact.
    assert_equal(found, {name: tensor * 1.5 for name, tensor in first.items()} if ranks.rank == 0 else {})


def case_replicas_are_rounded_alike(ranks: Ranks) -> None:
    # Parts of other sizes come before what all ranks hold whole.
    mesh = line(ranks.world)
    torch.manual_seed(0)
    cut = distribute_tensor(torch.randn(7, 3), mesh, [Shard(0)])
    tensors = {
        "cut": cut,
        "plain": torch.randn(50),
        "replica": distribute_tensor(torch.randn(60), mesh, [Replicate()]),
    }
    averages = WeightAverages(tensors, EMA(0.5), dtype=torch.bfloat16, rounding="stochastic")
    for _ in range(4):
        averages.update()
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).mul_(1.01)
    found = averages.weights()
    for name in ("plain", "replica"):
        part = found[name].to_local() if isinstance(found[name], DTensor) else found[name]
        others = [torch.empty_like(part) for _ in range(ranks.world)]
        distributed.all_gather(others, part)
        assert all(torch.equal(part, other) for other in others), name


def case_compiled_and_checkpointed(ranks: Ranks) -> None:
    model = transformer()
    for number, layer in enumerate(model.layers):
        model.layers[number] = checkpoint_wrapper(layer)
        if number == 0:
            model.layers[number] = torch.compile(model.layers[number], backend="aot_eager")
        fully_shard(model.layers[number], mesh=line(ranks.world))
    fully_shard(model, mesh=line(ranks.world))
    averages = assert_follows(model, transformer(), ranks.rank, 3)
    assert averages.weights("ema").keys() == transformer().state_dict().keys()
    assert_swaps(model, averages)
