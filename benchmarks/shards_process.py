"""One rank of `python -m benchmarks shards`: updates averages of a sharded model, and counts what that took."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.shard_arithmetic import Decoder, Share
from fastswa import EMA, WeightAverages


class _Part(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype)))


def sharded(decoder: Decoder, world: int) -> nn.Module:
    """A module of a decoder's tensors in bfloat16, cut over all ranks; it can't be called.

    Args:
        decoder: its sizes.
        world: how many ranks.
    """
    model = _Part(decoder.rest(), torch.bfloat16)
    model.layers = nn.ModuleList(_Part(decoder.layer(), torch.bfloat16) for _ in range(decoder.layers))
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def count(decoder: Decoder, counts: tuple[int, ...], directory: str, world: int, rank: int) -> list[Share]:
    """Be a rank, and count an update of so many averages each.

    Args:
        decoder: the model's sizes.
        counts: numbers of averages.
        directory: where the ranks meet.
        world: how many there are.
        rank: which this is.

    Returns:
        For each number of averages what the update took here.
    """
    # The kernels' own tables and launches, on a CPU; read when Triton is imported, at the first update.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=world)
    shares = _counted(sharded(decoder, world), counts)
    # The model, in a reference cycle, holds process groups, whose threads abort an interpreter that ends before them.
    gc.collect()
    distributed.destroy_process_group()
    return shares


def _counted(model: nn.Module, counts: tuple[int, ...]) -> list[Share]:
    rules = [{str(number): EMA(0.9) for number in range(averages)} for averages in counts]
    return [_share(WeightAverages(model, each, backend="triton")) for each in rules]


def _share(averages: WeightAverages) -> Share:
    from fastswa_kernels.average_launch import Launch

    launched: list[Launch] = []
    run = Launch.run

    def counting(launch: Launch, *arguments: Any) -> None:
        launched.append(launch)
        run(launch, *arguments)

    Launch.run = counting  # type: ignore[method-assign]
    try:
        with CommDebugMode() as collectives:
            averages.update()
    finally:
        Launch.run = run  # type: ignore[method-assign]
    held = [part for sets in averages.state_dict()["averages"].values() for named in sets for part in named.values()]
    parts: list[Tensor] = [part.to_local() for part in held]
    weight = torch.bfloat16.itemsize
    return Share(
        sum(part.numel() for part in parts) // len(averages.rules),
        sum(part.nbytes for part in parts),
        # A row of a table holds an address to read, a number of elements, and addresses to write.
        sum(int(launch.table[:, 1].sum()) * (weight + 2 * parts[0].itemsize * launch.averages) for launch in launched),
        len(launched),
        collectives.get_total_counts(),
    )
