"""SWAG's moments against numpy in float64, and which tensors have them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from fastswa import SWA, SWAG, WeightAverages
from tests.models import ComplexNet, ConvNet, TiedNet, train_step
from tests.swag import held, parameters, twelve, walked


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_moments_follow_float64_around_the_ring(dtype: torch.dtype, backend: str) -> None:
    # The interpreter takes milliseconds for each tensor.
    model = ConvNet() if backend == "torch" else nn.Linear(5, 3)
    steps, rank = 23, 5
    swag, models = walked(model, steps, rank=rank, dtype=dtype, backend=backend)
    # Each update adds at most 2 roundings of a value below the largest to the mean. A variance and a deviation are made
    # of differences from means that are off by as much; twice the largest bounds a difference, its square a variance.
    largest = max(np.abs(models).max(), 1)
    error = 2 * steps * torch.finfo(dtype).eps * largest
    assert np.abs(held(swag, "mean") - models.mean(0)).max() <= error
    assert np.abs(held(swag, "variance") - models.var(0)).max() <= 4 * largest * error
    assert swag.n_averaged == steps
    assert swag.columns == rank
    for index in range(steps - rank, steps):
        deviation = models[index] - models[: index + 1].mean(0)
        assert np.abs(held(swag, "deviations", index % rank) - deviation).max() <= 2 * error


def test_before_the_ring_is_full_it_holds_a_deviation_for_each_model() -> None:
    swag, models = walked(twelve(), 3, rank=20, dtype=torch.float64)
    assert swag.columns == len(swag.state_dict()["deviations"]) == 3
    assert (held(swag, "deviations", 0) == 0).all()
    assert np.allclose(held(swag, "deviations", 2), models[2] - models.mean(0), rtol=0, atol=1e-14)


def test_a_small_variance_beside_a_large_mean() -> None:
    weight = nn.Parameter(torch.empty(1000))

    def step(_: nn.Module) -> None:
        with torch.no_grad():
            weight.normal_(1, 1e-4)

    swag, models = walked(nn.ParameterDict({"weight": weight}), 100, step)
    exact = models.var(0)
    # A mean that is off by 2^-24 is, of a standard deviation of 1e-4, 6e-4: a relative error of 1.2e-3 in the squares.
    # The errors of 100 updates are a random walk of at most 10 such steps, weighted by 1/100 and less.
    assert np.abs(held(swag, "variance") / exact - 1).max() < 1e-2
    # What the mean of squares gives, in float32.
    squares = torch.from_numpy(models).float().square().mean(0) - torch.from_numpy(models).float().mean(0).square()
    assert np.abs(squares.numpy() / exact - 1).max() > 1


@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (0, 4), (2, 3)])
def test_start_and_every_are_those_of_the_rules(start: int, every: int) -> None:
    model = twelve()
    swag = SWAG(model, start=start, every=every)
    averages = WeightAverages(model, SWA(start=start, every=every))
    for _ in range(11):
        train_step(model)
        swag.collect()
        averages.update()
    assert swag.n_averaged == averages.n_averaged["average"] == len(range(start, 11, every))
    swag.mean_()
    for name, tensor in model.named_parameters():
        # Two float32 means of numbers below 4, each with 11 roundings at most.
        assert torch.allclose(tensor, averages.weights()[name], rtol=0, atol=1e-5)


def test_what_is_tied_is_sampled_once() -> None:
    model = TiedNet()
    swag, _ = walked(model, 4)
    assert "head.weight" not in swag.state_dict()["mean"]
    swag.sample_()
    assert model.head.weight is model.embedding.weight
    other = TiedNet()
    torch.manual_seed(1)
    swag.sample_(other)
    first = other.embedding.weight.clone()
    torch.manual_seed(1)
    swag.sample_()
    assert torch.equal(model.head.weight, first)


def test_frozen_parameters_buffers_and_layouts_stay() -> None:
    model = ConvNet()

    def step(model: nn.Module) -> None:
        frozen = model.head.bias.clone()
        train_step(model)
        with torch.no_grad():
            model.head.bias.copy_(frozen)

    swag, models = walked(model, 6, step)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    frozen = model.head.bias.clone()
    swag.sample_()
    assert torch.equal(model.head.bias, frozen)
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.named_buffers())
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    # No weight is further than the sampler's tail allows: 7 standard deviations of either part.
    spread = 7 * models.std(0) * (1 + math.sqrt(6))
    assert (np.abs(parameters(model) - models.mean(0)) <= spread + 1e-5).all()
    swag.mean_()
    # 6 updates of 2 float32 roundings of numbers below 4.
    assert np.allclose(parameters(model), models.mean(0), rtol=0, atol=1e-5)


def test_a_part_of_a_model() -> None:
    model = ConvNet()
    assert SWAG(model, trainable_only=True).state_dict()["mean"].keys() == {
        *(name for name, tensor in model.named_parameters() if tensor.requires_grad)
    }
    swag = SWAG(model, include="head.*", exclude="*.bias")
    for _ in range(3):
        train_step(model)
        swag.collect()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    swag.sample_()
    changed = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])]
    assert changed == ["head.weight"]


def test_integer_parameters_are_left_alone() -> None:
    places = nn.Parameter(torch.arange(3), requires_grad=False)
    swag, _ = walked(nn.ParameterDict({"weight": nn.Parameter(torch.zeros(4)), "places": places}), 3)
    assert swag.state_dict()["mean"].keys() == {"weight"}
    swag.sample_()
    swag.mean_()
    # Each training step adds 1.
    assert torch.equal(places, torch.arange(3) + 3)


def test_a_bfloat16_model_has_float32_moments() -> None:
    model = ConvNet().bfloat16()
    swag, models = walked(model, 8)
    assert {tensor.dtype for tensor in swag.state_dict()["mean"].values()} == {torch.float32}
    largest = np.abs(models).max()
    # 8 updates of two float32 roundings each: no bfloat16 rounding is in it.
    assert np.abs(held(swag, "mean") - models.mean(0)).max() <= 16 * 2**-23 * largest
    wide = ConvNet()
    for target in (model, wide):
        swag.sample_(target, generator=torch.Generator().manual_seed(0))
    for narrow, exact in zip(model.parameters(), wide.parameters(), strict=True):
        assert narrow.dtype == torch.bfloat16
        # One rounding to nearest, of half a step of at most 2^-7 of the value.
        assert torch.allclose(narrow.double(), exact.double(), rtol=2**-8, atol=1e-30)


def test_complex_weights_are_pairs() -> None:
    model = ComplexNet()
    swag = SWAG(model)
    models = []
    for _ in range(5):
        train_step(model)
        swag.collect()
        models.append(model.filter.detach().clone())
    mean, variance = torch.stack(models).mean(0), torch.view_as_real(torch.stack(models)).var(0, correction=0)
    # 5 updates of two float32 roundings of numbers below 4.
    assert torch.allclose(swag.state_dict()["variance"]["filter"], variance, rtol=0, atol=1e-5)
    swag.sample_()
    swag.mean_()
    assert torch.allclose(model.filter, mean, rtol=0, atol=1e-5)


def test_sharded_weights_are_refused() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.ParameterDict({"whole": nn.Parameter(torch.zeros(2))})
        model["part"] = nn.Parameter(distribute_tensor(torch.zeros(4), mesh))
        with pytest.raises(TypeError, match="'part' is a DTensor, of which each process holds a part"):
            SWAG(model)
        assert SWAG(model, exclude="part").state_dict()["mean"].keys() == {"whole"}
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": -1}, ValueError, "rank must be an int of at least 0, got -1"),
        ({"rank": 2.5}, ValueError, "rank must be an int"),
        ({"every": 0}, ValueError, "every must be an int of at least 1"),
        ({"start": -1}, ValueError, "start must be an int of at least 0"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype must be torch.float32 or torch.float64"),
        ({"include": "nothing"}, ValueError, "no tensor is averaged"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"model": nn.LazyLinear(3)}, ValueError, "'weight' of the model is not initialised"),
    ],
)
def test_bad_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"model": ConvNet(), **options}
    with pytest.raises(error, match=message):
        SWAG(arguments.pop("model"), **arguments)
