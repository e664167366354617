"""What an update costs and touches, on a CPU and on a GPU, and what it leaves to others."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

import fastswa
from tests.models import ConvNet, assert_same_average, train_step, update_both


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_an_update_reads_nothing_back_and_takes_few_operations() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(50)))
    average = fastswa.AveragedModel(model)
    update_both(model, average, steps=2)
    train_step(model)
    with _Calls() as calls:
        average.update_parameters(model)
    assert "aten::_local_scalar_dense" not in calls.names
    # 200 parameters and 150 buffers: a gathering and a lerp, a gathering each for float and integer buffers, the count.
    assert len(calls.names) <= 5, calls.names


def test_a_graph_that_needs_the_old_average_fails_as_in_torch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for average in (fastswa.AveragedModel(model), swa_utils.AveragedModel(model)):
        average.update_parameters(model)
        inputs = torch.randn(3, 4, requires_grad=True)
        loss = average(inputs).square().sum()
        train_step(model)
        average.update_parameters(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_state_dict_taken_before_the_first_update_stays_alive() -> None:
    model = ConvNet()
    average = fastswa.AveragedModel(model)
    state = average.state_dict()
    update_both(model, average)
    assert all(torch.equal(tensor, state[name]) for name, tensor in average.state_dict().items())
    assert torch.equal(state["module.head.weight"], average.module.head.weight)


def test_shared_memory_stays_shared() -> None:
    model = ConvNet()
    average, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    update_both(model, average, theirs)
    average.share_memory()
    addresses = [tensor.data_ptr() for tensor in average.state_dict().values()]
    update_both(model, average, theirs)
    assert addresses == [tensor.data_ptr() for tensor in average.state_dict().values()]
    assert all(tensor.is_shared() for tensor in average.parameters())
    assert_same_average(average, theirs)


def test_updates_in_and_out_of_inference_mode() -> None:
    model = ConvNet()
    average, theirs = fastswa.AveragedModel(model, dtype=torch.float64), swa_utils.AveragedModel(model).double()
    for inference in (True, False, True, False):
        train_step(model)
        with torch.inference_mode(inference):
            average.update_parameters(model)
            theirs.update_parameters(model)
    assert_same_average(average, theirs)
    with torch.inference_mode():
        inside = fastswa.AveragedModel(model)
        for _ in range(2):
            inside.update_parameters(model)
    assert int(inside.n_averaged) == 2


def test_an_average_is_freed_without_the_garbage_collector() -> None:
    model = ConvNet()
    average = fastswa.AveragedModel(model)
    update_both(model, average)
    gc.disable()
    try:
        gone = [weakref.ref(average), weakref.ref(average.module), weakref.ref(average.module.head.weight)]
        del average
        assert [reference() for reference in gone] == [None] * 3
    finally:
        gc.enable()


def test_the_average_does_not_keep_the_model_alive() -> None:
    model = ConvNet()
    average = fastswa.AveragedModel(model)
    update_both(model, average)
    gone = [weakref.ref(tensor) for tensor in model.parameters()]
    del model
    gc.collect()
    assert all(reference() is None for reference in gone)
    other = ConvNet()
    update_both(other, average)
    assert int(average.n_averaged) == 4


@pytest.mark.gpu
def test_an_update_on_a_gpu_never_waits_for_the_device() -> None:
    model = ConvNet().cuda()
    for device in (None, "cuda"):
        average = fastswa.AveragedModel(model, device=device, multi_avg_fn=fastswa.EMA(0.9))
        for _ in range(2):
            average.update_parameters(model)
        torch.cuda.set_sync_debug_mode("error")
        try:
            average.update_parameters(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert int(average.n_averaged) == 3


@pytest.mark.gpu
def test_a_captured_update_counts_on_the_device() -> None:
    model = ConvNet().cuda()
    average = fastswa.AveragedModel(model, device="cuda")
    average.update_parameters(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average.update_parameters(model)
    theirs = swa_utils.AveragedModel(model, device="cuda")
    theirs.load_state_dict(average.state_dict())
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        graph.replay()
        theirs.update_parameters(model)
    average.update_parameters(model)
    theirs.update_parameters(model)
    assert int(average.n_averaged) == int(theirs.n_averaged)
    assert_same_average(average, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize(("average_device", "model_device"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_average_and_model_on_different_devices(average_device: str, model_device: str) -> None:
    model = ConvNet().to(model_device)
    ours = fastswa.AveragedModel(model, device=average_device)
    theirs = swa_utils.AveragedModel(model, device=average_device)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert_same_average(ours, theirs)
