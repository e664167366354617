"""AveragedModel against torch.optim.swa_utils.AveragedModel and against float64, step by step."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastswa
from tests.models import ComplexNet, ConvNet, TiedNet, train_step
from tests.numerics import assert_close_in_ulps, lerp_ulps

STEPS = 5
NETS: dict[str, Callable[[], nn.Module]] = {"conv": ConvNet, "tied": TiedNet, "complex": ComplexNet}
# A name, what torch is given, what fastswa is given, and the decay (None: SWA).
FUNCTIONS = {
    "default": ({}, {}, None),
    "swa_multi": ({"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()}, {"multi_avg_fn": fastswa.SWA()}, None),
    "swa_avg_fn": ({"avg_fn": swa_utils.get_swa_avg_fn()}, {"avg_fn": fastswa.get_swa_avg_fn()}, None),
    "ema_multi": (
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7)},
        {"multi_avg_fn": fastswa.get_ema_multi_avg_fn(0.7)},
        0.7,
    ),
    "ema_avg_fn": ({"avg_fn": swa_utils.get_ema_avg_fn(0.9)}, {"avg_fn": fastswa.get_ema_avg_fn(0.9)}, 0.9),
}


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class Exact:
    """The same average in float64, one tensor at a time, from the definition."""

    def __init__(self, decay: float | None, use_buffers: bool) -> None:
        self.decay, self.use_buffers, self.values, self.largest, self.count = decay, use_buffers, {}, {}, 0

    def update(self, model: nn.Module) -> None:
        averaged = [name for name, _ in model.named_parameters()]
        averaged += [name for name, _ in model.named_buffers()] if self.use_buffers else []
        weight = 1 / (self.count + 1) if self.decay is None else 1 - self.decay
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            new = real(tensor.detach()).to(torch.float64, copy=True) if inexact(tensor) else tensor.clone()
            if self.count and name in averaged and inexact(tensor):
                new = self.values[name] * (1 - weight) + new * weight
            self.values[name] = new
            if inexact(tensor):
                now = torch.maximum(new.abs(), real(tensor.detach()).double().abs())
                self.largest[name] = torch.maximum(self.largest.get(name, now), now)
        self.count += 1

    def check(self, module: nn.Module) -> None:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not inexact(tensor):
                assert torch.equal(tensor, self.values[name]), name
                continue
            # Each step errs by its own bound, and half an ulp more for a weight rounded to float32; errors only shrink
            # afterwards, because every later step scales them by 1 - weight.
            bound = (lerp_ulps(real(tensor).dtype) + 0.5) * self.count
            assert_close_in_ulps(real(tensor.detach()), self.values[name], bound, self.largest[name])


@pytest.mark.parametrize("use_buffers", [False, True], ids=["copy_buffers", "average_buffers"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("net", NETS)
def test_each_step_equals_torch_and_float64(net: str, function: str, use_buffers: bool) -> None:
    model = NETS[net]()
    theirs_arguments, ours_arguments, decay = FUNCTIONS[function]
    ours = fastswa.AveragedModel(model, use_buffers=use_buffers, **ours_arguments)
    theirs = swa_utils.AveragedModel(model, use_buffers=use_buffers, **theirs_arguments)
    exact = Exact(decay, use_buffers)
    # torch's SWA raises on averaged integer and bool buffers; the float64 average is compared all the same.
    torch_fails = decay is None and use_buffers and net == "conv"
    for step in range(STEPS):
        train_step(model)
        ours.update_parameters(model)
        exact.update(model)
        exact.check(ours.module)
        assert int(ours.n_averaged) == step + 1
        if torch_fails:
            continue
        theirs.update_parameters(model)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for (name, tensor), other in zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True):
            # torch's avg_fn path rounds up to four times a step at this scale, ours as in numerics.py.
            assert_close_in_ulps(
                real(tensor.detach()), real(other.detach()).double(), 4.0 * (step + 1), exact.largest[name]
            )
        for (name, tensor), other in zip(ours.module.named_buffers(), theirs.module.buffers(), strict=True):
            if inexact(tensor):
                # torch's SWA multi function computes its weight in float32, half an ulp of which is 2^28 of float64's.
                rounded = function == "swa_multi" and real(tensor).dtype == torch.float64
                bound = (2.0**28 if rounded else 4.0) * (step + 1)
                assert_close_in_ulps(real(tensor), real(other).double(), bound, exact.largest[name])
            elif not use_buffers:
                assert torch.equal(tensor, other), name


@pytest.mark.parametrize("function", ["default", "ema_multi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("use_buffers", [False, True], ids=["copy_buffers", "average_buffers"])
def test_models_of_other_dtypes(dtype: torch.dtype, function: str, use_buffers: bool) -> None:
    model = ConvNet().to(dtype)
    _, arguments, decay = FUNCTIONS[function]
    ours = fastswa.AveragedModel(model, use_buffers=use_buffers, **arguments)
    exact = Exact(decay, use_buffers)
    for _ in range(STEPS):
        train_step(model)
        ours.update_parameters(model)
        exact.update(model)
        exact.check(ours.module)
    assert all(tensor.dtype == dtype for tensor in ours.module.parameters())


@pytest.mark.parametrize("function", ["default", "ema_multi"])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("average", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("use_buffers", [False, True], ids=["copy_buffers", "average_buffers"])
def test_average_in_another_dtype(source: torch.dtype, average: torch.dtype, function: str, use_buffers: bool) -> None:
    model = ConvNet(width=40).to(source)  # hidden: 432000 elements
    _, arguments, decay = FUNCTIONS[function]
    ours = fastswa.AveragedModel(model, use_buffers=use_buffers, dtype=average, **arguments)
    assert {tensor.dtype for tensor in ours.module.parameters()} == {average}
    exact = Exact(decay, use_buffers)
    for _ in range(3):
        train_step(model)
        ours.update_parameters(model)
        exact.update(model)
        exact.check(ours.module)
    assert ours.module.head.weight.dtype == average
    assert ours.module.norm.num_batches_tracked.dtype == torch.int64
    ours.module.eval()(torch.randn(2, 1, 8, 8, dtype=average))


def test_a_bfloat16_average_would_stand_still_and_a_float32_one_does_not() -> None:
    model = nn.Linear(50, 50).bfloat16()
    low = fastswa.AveragedModel(model, multi_avg_fn=fastswa.EMA(0.9999))
    high = fastswa.AveragedModel(model, multi_avg_fn=fastswa.EMA(0.9999), dtype=torch.float32)
    for average in (low, high):
        average.update_parameters(model)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.mul_(1.5)
    for _ in range(200):
        low.update_parameters(model)
        high.update_parameters(model)
    moved = (model.weight - start).detach().double() * (1 - 0.9999**200)
    assert torch.equal(low.module.weight, start)
    # 200 roundings of float32 on a distance of 1 % of the weight.
    assert torch.allclose(high.module.weight.double() - start.double(), moved, rtol=1e-2, atol=1e-6)


def test_dtype_leaves_complex_and_integer_tensors() -> None:
    ours = fastswa.AveragedModel(ComplexNet(), dtype=torch.float64)
    assert ours.module.filter.dtype == torch.complex64
    assert ours.module.gain.dtype == torch.float64


def test_the_triton_backend_gives_the_same_average() -> None:
    for net, dtype in ((ConvNet, None), (TiedNet, None), (ComplexNet, None), (ConvNet, torch.float64)):
        model = net()
        exact = Exact(None, use_buffers=False)
        ours = fastswa.AveragedModel(model, backend="triton", dtype=dtype)
        for _ in range(3):
            train_step(model)
            ours.update_parameters(model)
            exact.update(model)
            exact.check(ours.module)


def test_a_nan_in_the_average_does_not_survive_the_first_update() -> None:
    for backend in ("torch", "triton"):
        model = ConvNet()
        ours = fastswa.AveragedModel(model, use_buffers=True, backend=backend)
        with torch.no_grad():
            for tensor in ours.module.parameters():
                tensor.fill_(float("nan"))
        ours.update_parameters(model)
        for tensor, other in zip(ours.module.parameters(), model.parameters(), strict=True):
            assert torch.equal(tensor, other)


def test_a_model_whose_layout_changes_between_updates() -> None:
    model = ConvNet(width=40)
    ours, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    for change in (
        lambda: None,
        lambda: model.to(memory_format=torch.contiguous_format),
        lambda: setattr(model.hidden.weight, "data", model.hidden.weight.data.t().contiguous().t()),
        lambda: setattr(model.conv.weight, "data", torch.randn(40, 1, 3, 6)[..., ::2]),
    ):
        change()
        train_step(model)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        for tensor, other in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
            # Both within 4 roundings a step of one another, 4 steps, weights below 4: an absolute bound will do.
            assert torch.allclose(tensor, other, rtol=0, atol=16 * 4 * 2**-24)
    assert ours.module.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_training_with_and_without_fastswa_is_one_trajectory() -> None:
    data = [(torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))) for _ in range(6)]
    start = ConvNet()
    results = []
    for library in (fastswa, swa_utils):
        model = deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        average = library.AveragedModel(model)
        scheduler = library.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for inputs, target in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
        library.update_bn([inputs for inputs, _ in data], average)
        results.append((model, average))
    (model, ours), (other, theirs) = results
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    inputs = data[0][0]
    # The averages differ by a few ulp (6 steps), the logits are of size 1 and pass through three layers.
    assert torch.allclose(ours.eval()(inputs), theirs.eval()(inputs), rtol=0, atol=1e-5)
