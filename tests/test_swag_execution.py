"""SWAG beside a training: samples lent to the model and taken back, moments in a thread and on a GPU."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import fastswa.execution
from fastswa import SWAG, update_bn
from tests.models import ConvNet, train_step
from tests.swag import contents, same, sample, save_and_load, trained, values


def test_a_sample_is_undone_bit_for_bit() -> None:
    model = ConvNet()
    swag = trained(model)
    train_step(model)
    before, moments = values(model), contents(swag)
    addresses = [tensor.data_ptr() for tensor in model.parameters()]
    expected = sample(swag, model)
    for error in (None, RuntimeError("body"), KeyboardInterrupt()):
        generator = torch.Generator().manual_seed(1)
        with nullcontext() if error is None else pytest.raises(type(error)), swag.sampled(generator=generator):
            assert same(values(model), expected)
            update_bn([torch.randn(4, 1, 8, 8) for _ in range(2)], model)
            assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
            swag.sample_(generator=generator)
            assert not torch.equal(model.hidden.weight, expected["hidden.weight"])
            if error is not None:
                raise error
        assert same(values(model), before)
        assert addresses == [tensor.data_ptr() for tensor in model.parameters()]
        assert same(swag.state_dict(), moments)


def test_a_sample_is_not_collected() -> None:
    model = ConvNet()
    swag = trained(model)
    with swag.sampled(scale=0):
        held, mean = model.hidden.weight.clone(), swag.state_dict()["mean"]["hidden.weight"]
        with pytest.raises(RuntimeError, match=r"collect: the model holds a sample; leave sampled\(\) first"):
            swag.collect()
        with pytest.raises(RuntimeError, match="holds a sample already"):
            swag.sampled().__enter__()
    assert torch.equal(held, mean)
    swag.collect()
    assert swag.n_averaged == 6


def test_a_graph_notices_that_its_weights_were_sampled() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    swag = trained(model)
    loss = model(torch.randn(2, 3)).sum()
    swag.sample_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_sees_every_sample(gradients: bool) -> None:
    model = nn.Linear(4, 3)
    swag, x = trained(model), torch.randn(5, 4)

    def predictions() -> list[Tensor]:
        """Of the model, a sample, the mean, and the model again."""
        found = [model(x)]
        with swag.sampled(generator=torch.Generator().manual_seed(1)):
            found.append(model(x))
            swag.mean_()
            found.append(model(x))
        return [*found, model(x)]

    with torch.set_grad_enabled(gradients):
        exact = predictions()
        with torch.autocast("cpu", torch.bfloat16):
            cast = predictions()
    for narrow, wide in zip(cast, exact, strict=True):
        # bfloat16 roundings of 4 products and of their sum; the weights of the others are off by ten times as much.
        assert torch.allclose(narrow.float(), wide, rtol=0, atol=0.05)
    assert not any(torch.allclose(exact[0], other, rtol=0, atol=0.2) for other in exact[1:3])
    assert not torch.allclose(exact[1], exact[2], rtol=0, atol=0.2)


def test_taken_in_by_a_thread_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ConvNet()
    here = SWAG(model, rank=3, start=1, every=2)
    # The model on the CPU stands for one on a GPU.
    monkeypatch.setattr(fastswa.execution, "offloads", lambda followed, device: device is not None)
    there = SWAG(model, rank=3, start=1, every=2, device="cpu")
    for _ in range(9):
        train_step(model)
        here.collect()
        there.collect()
    assert there.n_averaged == 4
    assert same(here.state_dict(), there.state_dict())
    assert same(sample(here, model), sample(there, model))
    copied_model, copied = copy.deepcopy((model, there))
    train_step(copied_model)
    copied.collect()
    copied.collect()
    assert copied.n_averaged == 5
    assert there.n_averaged == 4


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"device": "cpu"}], ids=["on the GPU", "on the CPU"])
def test_a_gpu_gives_what_a_cpu_gives(options: dict[str, object]) -> None:
    model = ConvNet()
    gpu_model = copy.deepcopy(model).cuda()
    here, there = SWAG(model, rank=4), SWAG(gpu_model, rank=4, **options)
    for _ in range(7):
        train_step(model)
        gpu_model.load_state_dict(model.state_dict())
        here.collect()
        there.collect()
    ours, theirs = here.state_dict(), there.state_dict()
    expected_device = options.get("device", "cuda")
    for key in ("mean", "variance"):
        for name, tensor in theirs[key].items():
            assert tensor.device.type == expected_device
            # 7 updates of a few float32 roundings of numbers below 16.
            assert torch.allclose(tensor.cpu(), ours[key][name], rtol=1e-5, atol=1e-5), name
    for own, other in zip(ours["deviations"], theirs["deviations"], strict=True):
        assert all(torch.allclose(tensor.cpu(), own[name], rtol=1e-5, atol=1e-5) for name, tensor in other.items())
    before = values(gpu_model)
    with there.sampled(generator=torch.Generator().manual_seed(1)):
        drawn = values(gpu_model)
    assert same(values(gpu_model), before)
    for name, tensor in sample(here, model).items():
        # The logarithm and the sine differ in their last bits.
        assert torch.allclose(drawn[name].cpu().double(), tensor.double(), rtol=1e-4, atol=1e-4), name
    saved = save_and_load(there)
    resumed = SWAG(gpu_model, rank=4, **options)
    resumed.load_state_dict(saved)
    assert same(resumed.state_dict(), there.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"device": "cpu"}], ids=["on the GPU", "on the CPU"])
def test_collecting_does_not_wait_for_the_device(options: dict[str, object]) -> None:
    model = ConvNet().cuda()
    swag = SWAG(model, rank=3, **options)
    for _ in range(3):
        swag.collect()
    torch.cuda.set_sync_debug_mode("error")
    try:
        swag.collect()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert swag.n_averaged == 4


@pytest.mark.gpu
def test_the_moments_follow_their_model_to_a_gpu() -> None:
    model = ConvNet()
    swag, stays = SWAG(model, rank=2), SWAG(model, rank=2, device="cpu")
    for place in ("cpu", "cuda", "cpu", "cuda"):
        model.to(place)
        train_step(model)
        swag.collect()
        stays.collect()
    assert {tensor.device.type for tensor in swag.state_dict()["mean"].values()} == {"cuda"}
    for name, tensor in stays.state_dict()["variance"].items():
        # 4 float32 updates, rounded on either device.
        assert torch.allclose(swag.state_dict()["variance"][name].cpu(), tensor, rtol=1e-5, atol=1e-5), name
