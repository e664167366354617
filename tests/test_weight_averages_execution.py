"""WeightAverages beside the training: on a side stream, in a thread on the CPU, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import fastswa.execution
from fastswa import EMA, LAWA, SWA, AveragedModel, WeightAverages
from tests.models import ConvNet, train_step

RULES = {"one": EMA(0.9), "other": SWA(), "window": LAWA(2)}
PRECISIONS = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16, "rounding": "stochastic"}}


@pytest.fixture(params=["beside", "in a thread"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Options that make an update run elsewhere; on a CPU the model stands for one on a GPU."""
    if request.param == "beside":
        return {"overlap": True}
    monkeypatch.setattr(fastswa.execution, "offloads", lambda followed, device: device is not None)
    return {"device": "cpu"}


def run(averages: WeightAverages, model: nn.Module, steps: int, skip: Callable[[int], Tensor | None]) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        train_step(model)
        averages.update(skip(step))
        # What the averages may not see any more.
        for buffer in model.buffers():
            buffer.zero_()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("counting", ["host", "device"])
def test_the_same_numbers_wherever_it_runs(way: dict[str, object], precision: str, counting: str) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    here_model = deepcopy(model)
    options = {"capturable": counting == "device", **PRECISIONS[precision]}
    there = WeightAverages(model, RULES, **way, **options)
    here = WeightAverages(here_model, RULES, **options)

    def skip(step: int) -> Tensor | None:
        return torch.tensor(float(step == 2)) if step % 2 == 0 else None

    for averages, followed in ((there, model), (here, here_model)):
        run(averages, followed, 5, skip)
    assert there.n_averaged == here.n_averaged == {"one": 4, "other": 4, "window": 4}
    for name in RULES:
        ours, theirs = there.weights(name), here.weights(name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # Copies, saved states and swaps see everything that was handed over.
    train_step(model)
    there.update()
    copied_model, copied = deepcopy((model, there))
    assert copied.n_averaged["one"] == 5
    run(copied, copied_model, 1, lambda step: None)
    resumed = WeightAverages(model, RULES, **way, **options)
    resumed.load_state_dict(there.state_dict())
    assert resumed.n_averaged == there.n_averaged
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = there.weights("other")
    with there.swapped("other"):
        assert all(torch.equal(tensor, expected[key].to(tensor.dtype)) for key, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_error_in_the_thread_is_raised_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastswa.execution, "offloads", lambda followed, device: True)
    model = nn.Linear(3, 2)
    averages = WeightAverages(model, EMA(0.5))
    averages.update()

    def broken(*_: object) -> None:
        raise OSError("no memory")

    averages.wait()
    with monkeypatch.context() as patch:
        patch.setattr(averages._averaging.counters, "_update_from_host", broken)
        averages.update()
        with pytest.raises(OSError, match="no memory"):
            averages.wait()
    averages.update()
    assert averages.n_averaged == {"average": 2}


def test_offloading_is_for_a_model_elsewhere() -> None:
    model = nn.Linear(3, 2)
    followed = WeightAverages(model, EMA(0.5))._averaging.selection.followed
    assert not fastswa.execution.offloads(followed, torch.device("cpu"))
    assert not fastswa.execution.offloads(followed, None)
    there = [type(each)(each.names, each.tensor.to("meta"), True, True, False) for each in followed]
    assert fastswa.execution.offloads(there, torch.device("cpu"))
    assert not fastswa.execution.offloads(there, None)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"device": "cpu"}], ids=["here", "beside", "in a thread"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gpu_gives_what_a_cpu_gives(options: dict[str, object], precision: str) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    gpu_model = deepcopy(model).cuda()
    here = WeightAverages(model, RULES, **PRECISIONS[precision])
    there = WeightAverages(gpu_model, RULES, **PRECISIONS[precision], **options)
    for step in range(5):
        torch.manual_seed(step)
        train_step(model)
        gpu_model.load_state_dict(model.state_dict())
        here.update()
        there.update()
    for name in RULES:
        ours, theirs = there.weights(name), here.weights(name)
        # One float32 rounding an update; under stochastic rounding it may tip a value to the other neighbour.
        bound = 1e-5 if precision == "float32" else 2**-6
        for key, tensor in theirs.items():
            if tensor.is_floating_point():
                assert torch.allclose(ours[key].cpu().double(), tensor.double(), rtol=bound, atol=bound), key
            else:
                assert torch.equal(ours[key].cpu(), tensor), key


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"device": "cpu"}], ids=["here", "beside", "in a thread"])
def test_no_update_waits_for_the_device(options: dict[str, object]) -> None:
    model = ConvNet().cuda()
    averages = WeightAverages(model, RULES, **options)
    skip = torch.zeros(1, device="cuda")
    for _ in range(3):
        averages.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        averages.update()
        if "device" not in options:
            averages.update(skip)
            averages.update(skip)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert averages.n_averaged["one"] == (4 if "device" in options else 6)


@pytest.mark.gpu
@pytest.mark.parametrize("counting", ["host", "device"])
def test_averages_follow_their_model_to_a_gpu(counting: str) -> None:
    model = ConvNet()
    averages = WeightAverages(model, RULES, capturable=counting == "device")
    stays = WeightAverages(model, RULES, device="cpu")
    for place in ("cpu", "cuda", "cpu", "cuda"):
        model.to(place)
        train_step(model)
        averages.update()
        stays.update()
    for name in RULES:
        ours, theirs = averages.weights(name), stays.weights(name)
        assert {tensor.device.type for tensor in ours.values()} == {"cuda"}
        assert {tensor.device.type for tensor in theirs.values()} == {"cpu"}
        for key, tensor in theirs.items():
            # Four float32 updates, rounded on either device.
            assert torch.allclose(ours[key].cpu().double(), tensor.double(), rtol=1e-5, atol=1e-5), key
    assert averages.n_averaged == stays.n_averaged == {"one": 4, "other": 4, "window": 4}


@pytest.mark.gpu
def test_optimizer_step_and_update_in_one_cuda_graph() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64).cuda()
    eager_model = deepcopy(model)
    x = torch.randn(8, 64, device="cuda")
    kinds = (("graph", model), ("eager", eager_model))
    optimizers = {
        kind: torch.optim.SGD(each.parameters(), lr=torch.tensor(0.1, device="cuda"), foreach=True)
        for kind, each in kinds
    }
    averages = {kind: WeightAverages(each, {"swa": SWA(), "ema": EMA(0.9)}, capturable=True) for kind, each in kinds}

    def step(kind: str, each: nn.Module) -> None:
        for parameter in each.parameters():
            parameter.grad = None
        each(x).square().mean().backward()
        optimizers[kind].step()
        averages[kind].update()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for kind, each in kinds:
            for _ in range(3):
                step(kind, each)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step("graph", model)
    for _ in range(5):
        graph.replay()
        step("eager", eager_model)
    assert averages["graph"].n_averaged == averages["eager"].n_averaged == {"swa": 8, "ema": 8}
    for name in ("swa", "ema"):
        ours, theirs = averages["graph"].weights(name), averages["eager"].weights(name)
        # The same kernels on the same numbers.
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("function", [None, EMA(0.9)], ids=["SWA", "EMA"])
def test_an_averaged_model_that_counts_on_the_device(function: EMA | None) -> None:
    model = ConvNet()
    counting = AveragedModel(model, multi_avg_fn=function, capturable=True)
    plain = AveragedModel(model, multi_avg_fn=function)
    for _ in range(4):
        train_step(model)
        counting.update_parameters(model)
        plain.update_parameters(model)
    assert int(counting.n_averaged) == 4
    ours, theirs = counting.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
