"""One of the processes of test_batch_norm_group.py: python batch_norm_process.py RANK DIRECTORY."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fastswa
from tests.batch_norm import assert_unchanged, state

rank, directory = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
group = distributed.group.WORLD
given = torch.load(directory / "given.pt", weights_only=False)
data: list[Tensor] = given["data"]


def fresh() -> nn.Module:
    """The model as it was given."""
    return torch.load(directory / "given.pt", weights_only=False)["model"]


def nan() -> Iterator[Tensor]:
    """A loader whose second batch is no number."""
    yield data[0]
    yield data[1] * float("nan")


def broken() -> Iterator[Tensor]:
    """A loader that fails."""
    yield data[0]
    raise OSError("disk")


class FailsInSweep:
    """A loader that fails on the first process, the second time."""

    passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(data) if self.passes == 1 or rank else broken()


results: dict[object, object] = {}
for name, options in given["options"].items():
    for part, slices in given["parts"].items():
        model = fresh()
        report = fastswa.update_bn(data[slice(*slices[rank])], model, process_group=group, **options)
        results[name, part] = model.state_dict(), report

wrapped = DistributedDataParallel(fresh())
own = data[slice(*given["parts"]["unequal"][rank])]
fastswa.update_bn(own, wrapped, process_group=group, progress=True)
assert wrapped.require_forward_param_sync
results["wrapped"] = wrapped.module.state_dict()

errors = {}
failures = {
    "raises": [broken(), data],
    "nan": [nan(), data],
    "nan seen early": [[*nan(), *data * 5], data],
    "empty": [[], []],
    "sweep": [FailsInSweep(), FailsInSweep()],
}
for name, loaders in failures.items():
    model = fresh()
    before = state(model)
    try:
        fastswa.update_bn(loaders[rank], model, process_group=group, sweeps=int(name == "sweep"))
    except Exception as error:
        errors[name] = type(error).__name__, str(error)
    assert_unchanged(model, before)

torch.save((results, errors), directory / f"{rank}.pt")
distributed.destroy_process_group()
