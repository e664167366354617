"""What needs no second process: parts as DTensors, and who pays for knowing them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

from fastswa import SWA, WeightAverages, average_across_ranks_, shards


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_part_keeps_its_memory_dtype_and_device(alone: None) -> None:
    # FSDP2 with offload, or averages on the CPU: the mesh is one of GPUs and the parts are not there.
    mesh = DeviceMesh("cuda", torch.arange(1), _init_backend=False)
    like = DTensor.from_local(torch.empty(3, 4, device="meta", dtype=torch.bfloat16), mesh, [Shard(0)])
    part = torch.ones(3, 4)
    whole = shards.placed(part, like)
    assert (whole.shape, whole.placements, whole.device_mesh) == (like.shape, like.placements, mesh)
    assert (whole.dtype, whole.device, whole.requires_grad) == (torch.float32, torch.device("cpu"), False)
    assert whole.to_local().data_ptr() == part.data_ptr()
    assert shards.placed(part, part) is part


def test_the_older_fsdp_is_refused(alone: None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))
    with pytest.raises(TypeError, match=r"'1' is FullyShardedDataParallel.*shard it by .*fully_shard"):
        WeightAverages(model, SWA())
    with pytest.raises(TypeError, match="the model is FullyShardedDataParallel"):
        WeightAverages(model[1], SWA())


def test_nobody_else_imports_dtensor() -> None:
    program = """
import sys, torch, fastswa
model = torch.nn.Linear(2, 2)
averages = fastswa.WeightAverages(model, fastswa.SWA())
averages.update()
with averages.swapped():
    averages_of = model.weight.clone()
fastswa.AveragedModel(model).update_parameters(model)
averages.load_state_dict(averages.state_dict())
assert "torch.distributed.tensor" not in sys.modules
assert "torch.distributed.fsdp" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_asking_ranks_needs_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"check_ranks=True needs torch.distributed.init_process_group first"):
        WeightAverages(nn.Linear(2, 2), SWA(), check_ranks=True)
    with pytest.raises(RuntimeError, match=r"average_across_ranks_ needs torch.distributed.init_process_group first"):
        average_across_ranks_(nn.Linear(2, 2))


def test_one_rank_agrees_with_itself_and_is_its_own_mean(alone: None) -> None:
    model = nn.Linear(2, 2)
    weight = model.weight.detach().clone()
    averages = WeightAverages(model, SWA(), check_ranks=True)
    averages.update()
    average_across_ranks_(averages)
    average_across_ranks_(model, weights=3)
    # A product and a quotient, each of half an ulp.
    assert torch.allclose(model.weight, weight, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    assert torch.equal(averages.weights()["weight"], weight)
