"""The parts under AveragedModel: flat buffers, watches, pairing, rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastswa
from fastswa.flat import FlatBuffers
from fastswa.module_update import FlatModule
from fastswa.pairing import canonical, pair_parameters
from fastswa.rules import Rule, recognise
from fastswa.watch import TensorWatch
from tests.models import ConvNet


def test_flat_buffers_keep_identity_values_and_memory_format() -> None:
    tensors = [
        torch.randn(3, 4),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(5, 2).t(),
        torch.zeros(0, 3),
        torch.tensor(3),
        torch.randn(4, 6)[:, ::2],
        torch.ones(2).expand(3, 2),
        torch.randn(3, dtype=torch.complex64),
    ]
    values = [tensor.clone() for tensor in tensors]
    strides = [tensor.stride() for tensor in tensors[:3]]
    flat = FlatBuffers(tensors)
    for tensor, value in zip(tensors, values, strict=True):
        assert torch.equal(tensor, value)
        if tensor.numel():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert [tensor.stride() for tensor in tensors[:3]] == strides
    assert flat.adjacent(tensors[0], tensors[1])
    assert not flat.adjacent(tensors[1], tensors[0])
    assert not flat.adjacent(tensors[2], tensors[4])  # another dtype, another buffer
    span = flat.span(tensors[0], tensors[1])
    span.zero_()
    assert not tensors[0].any()
    assert not tensors[1].any()
    assert torch.equal(tensors[2], values[2])


def test_flat_buffers_on_a_cpu_start_large_tensors_alike() -> None:
    tensors = [torch.randn(size) for size in (3, 5, 1 << 14, 7, 20_000)]
    values = [tensor.clone() for tensor in tensors]
    flat = FlatBuffers(tensors)
    assert flat.adjacent(tensors[0], tensors[1])
    assert [(tensors[index].data_ptr() - tensors[0].data_ptr()) % 4096 for index in (2, 4)] == [0, 0]
    assert all(map(torch.equal, tensors, values))


@pytest.mark.gpu
def test_flat_buffers_on_a_gpu_start_every_tensor_on_a_cache_line() -> None:
    tensors = [torch.randn(size, device="cuda") for size in (1, 3, 64, 5)]
    values = [tensor.clone() for tensor in tensors]
    FlatBuffers(tensors)
    assert all(tensor.data_ptr() % 128 == 0 for tensor in tensors)
    assert all(map(torch.equal, tensors, values))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "data": lambda model: setattr(model.head.bias, "data", torch.zeros(3)),
    "parameter": lambda model: setattr(model.head, "weight", nn.Parameter(torch.zeros(3, 300))),
    "layer": lambda model: setattr(model, "head", nn.Linear(300, 3)),
    "buffer": lambda model: setattr(model, "mask", torch.ones(5)),
    "equal_value": lambda model: setattr(model.norm, "num_batches_tracked", torch.zeros_like(_counter(model))),
    "equal_values": lambda model: setattr(model.norm, "running_mean", torch.zeros_like(model.norm.running_mean)),
    "equal_layer": lambda model: setattr(model, "equal", EqualToAll()),
    "dtype": lambda model: model.norm.double(),
    "deleted": lambda model: delattr(model.head, "bias"),
    "added": lambda model: model.head.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "none_to_tensor": lambda model: setattr(model.conv, "bias", nn.Parameter(torch.zeros(8))),
    "tensor_to_none": lambda model: setattr(model.head, "bias", None),
}


class EqualToAll(nn.Linear):
    """A layer that calls everything its equal."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = nn.Linear.__hash__


def _counter(model: nn.Module) -> Tensor:
    return model.norm.num_batches_tracked


@pytest.mark.parametrize("change", CHANGES)
def test_watches_see_a_change_and_nothing_else(change: str) -> None:
    model = ConvNet()
    model.equal = EqualToAll()
    flat = FlatModule(model)
    watches = [TensorWatch(model).unchanged, lambda: flat.holds(model)]
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    model.train(False)
    assert all(unchanged() for unchanged in watches)
    CHANGES[change](model)
    assert not any(unchanged() for unchanged in watches)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("layer.weight", "layer.weight"),
        ("module.layer.weight", "layer.weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("module._orig_mod.layer.weight", "layer.weight"),
        ("_orig_mod.module.layer.weight", "layer.weight"),
        ("blocks.0._orig_mod.weight", "blocks.0.weight"),
        ("submodule.weight", "submodule.weight"),
    ],
)
def test_canonical_names(name: str, plain: str) -> None:
    assert canonical(name) == plain


def test_names_that_only_differ_by_a_prefix_stay_apart() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "weight": nn.Linear(2, 2)})
    model["module"].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    other = nn.ModuleDict({"module": nn.Linear(2, 2), "weight": nn.Linear(2, 2)})
    other["module"].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    assert [pair.name for pair in pair_parameters(model, other)] == [name for name, _ in model.named_parameters()]


def test_rules_serve_int_and_tensor() -> None:
    for rule, expected in ((fastswa.SWA(), [1 / 2, 1 / 3, 1 / 8]), (fastswa.EMA(0.9), [1 - 0.9] * 3)):
        for n, weight in zip((1, 2, 7), expected, strict=True):
            assert rule.weight(n) == weight
            assert float(rule.weight(torch.tensor(n, dtype=torch.float64))) == weight
    with pytest.raises(NotImplementedError):
        Rule().weight(1)


def test_closures_of_torch_are_recognised() -> None:
    for make in (swa_utils.get_ema_avg_fn, swa_utils.get_ema_multi_avg_fn, fastswa.get_ema_avg_fn):
        assert recognise(make(0.9)) == fastswa.EMA(0.9)
    for make in (swa_utils.get_swa_avg_fn, swa_utils.get_swa_multi_avg_fn, fastswa.get_swa_avg_fn):
        assert recognise(make()) == fastswa.SWA()
    assert recognise(None) == fastswa.SWA()
    assert recognise(fastswa.EMA(0.5)) == fastswa.EMA(0.5)
    assert recognise(lambda averaged, current, n: averaged) is None
    assert recognise(swa_utils.update_bn) is None


def test_factories_return_what_torch_takes() -> None:
    averaged, current = torch.zeros(3), torch.ones(3)
    assert torch.equal(fastswa.get_ema_avg_fn(0.75)(averaged, current, 1), torch.full((3,), 0.25))
    assert torch.equal(fastswa.get_swa_avg_fn()(averaged, current, 3), torch.full((3,), 0.25))
    for rule in (fastswa.get_ema_multi_avg_fn(0.75), fastswa.get_swa_multi_avg_fn()):
        result = torch.zeros(3)
        rule([result], [current], torch.tensor(3))
        assert torch.equal(result, torch.full((3,), 0.25))
    integers: list[Tensor] = [torch.tensor(1)]
    fastswa.EMA(0.5)(integers, [torch.tensor(5)], 2)
    assert integers[0] == 5
    spectra = [torch.zeros(2, dtype=torch.complex64)]
    fastswa.EMA(0.5)(spectra, [torch.full((2,), 2 + 4j)], 2)
    assert torch.equal(spectra[0], torch.full((2,), 1 + 2j))
