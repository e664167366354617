"""What bad input gets from AveragedModel: an error that names the place, and an untouched average."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

import fastswa
from fastswa import backends
from tests.models import ConvNet, TiedNet, train_step


class WithoutHeadNorm(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        del self.head_norm


class WithExtra(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


def broadcastable() -> nn.Module:
    model = ConvNet()
    model.head.weight = nn.Parameter(torch.zeros(1, 1))
    return model


def other_buffer() -> nn.Module:
    model = ConvNet()
    model.norm.running_mean = torch.zeros(9)
    return model


def fewer_buffers() -> nn.Module:
    model = ConvNet()
    del model.mask
    return model


def untied() -> nn.Module:
    model = TiedNet()
    model.head.weight = nn.Parameter(torch.randn(11, 6))
    return model


MISMATCHES = {
    "fewer": (ConvNet, WithoutHeadNorm, r"holds 10 parameters and the model 8.*no parameter 'head_norm.weight'"),
    "more": (ConvNet, WithExtra, r"the average has no parameter 'extra.weight'"),
    "broadcastable": (ConvNet, broadcastable, r"'head.weight' has shape \(3, 300\) in the average but \(1, 1\)"),
    "wider": (ConvNet, lambda: ConvNet(width=9), r"'conv.weight' has shape"),
    "buffer_shape": (ConvNet, other_buffer, r"buffer 'norm.running_mean' has shape \(8,\) in the average but \(9,\)"),
    "fewer_buffers": (ConvNet, fewer_buffers, r"the model has no buffer 'mask'"),
    "tied_otherwise": (TiedNet, untied, r"tied differently|no parameter"),
}


@pytest.mark.parametrize("function", [None, fastswa.EMA(0.5), lambda a, p, n: None], ids=["swa", "ema", "own"])
@pytest.mark.parametrize("case", MISMATCHES)
def test_a_model_that_does_not_match(case: str, function: Callable[..., None] | None) -> None:
    make, make_other, message = MISMATCHES[case]
    model = make()
    average = fastswa.AveragedModel(model, multi_avg_fn=function)
    average.update_parameters(model)
    train_step(model)
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        average.update_parameters(make_other())
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.state_dict().items())
    average.update_parameters(model)
    assert int(average.n_averaged) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.head_norm.bias, "data", torch.zeros(301)),
        lambda model: setattr(model.head_norm.bias, "data", torch.zeros(1)),
        lambda model: setattr(model.norm.running_mean, "data", torch.zeros(1)),
        lambda model: setattr(model.head, "weight", nn.Parameter(model.head.weight.detach()[:2])),
        lambda model: model.hidden.register_buffer("late", torch.zeros(2)),
        lambda model: model.register_parameter("late", nn.Parameter(torch.zeros(2))),
    ],
    ids=["wider", "broadcastable", "buffer", "sliced", "new_buffer", "new_parameter"],
)
def test_a_model_that_changes_shape_in_mid_run(change: Callable[[nn.Module], object]) -> None:
    model = ConvNet()
    average = fastswa.AveragedModel(model)
    for _ in range(2):
        average.update_parameters(model)
    change(model)
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    with pytest.raises(ValueError, match=r"late|head_norm\.bias|running_mean|head\.weight"):
        average.update_parameters(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.state_dict().items())


def test_a_wrapped_or_renamed_model_still_matches() -> None:
    model = ConvNet()
    average = fastswa.AveragedModel(model)
    average.update_parameters(nn.ModuleDict({"module": model}))
    renamed = nn.ModuleDict({f"layer_{name}": part for name, part in ConvNet().named_children()})
    renamed.register_parameter("void", nn.Parameter(torch.zeros(0, 4)))
    only_layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other_names = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
    fastswa.AveragedModel(only_layers).update_parameters(other_names)


def test_a_function_as_device() -> None:
    for function in (fastswa.EMA(0.9), fastswa.get_ema_avg_fn()):
        with pytest.raises(TypeError, match=r"device is a function .*pass it as multi_avg_fn="):
            fastswa.AveragedModel(ConvNet(), function)


def test_both_functions() -> None:
    with pytest.raises(AssertionError, match="avg_fn and multi_avg_fn were both given"):
        fastswa.AveragedModel(ConvNet(), avg_fn=fastswa.get_swa_avg_fn(), multi_avg_fn=fastswa.SWA())


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), float("inf")])
def test_decays_outside_the_unit_interval(decay: float) -> None:
    for make in (fastswa.EMA, fastswa.get_ema_multi_avg_fn, fastswa.get_ema_avg_fn):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
            make(decay)


def test_a_nan_decay_in_a_closure_of_torch() -> None:
    closure = torch.optim.swa_utils.get_ema_multi_avg_fn(float("nan"))
    average = fastswa.AveragedModel(ConvNet(), multi_avg_fn=closure)
    with pytest.raises(ValueError, match="decay must be"):
        average.update_parameters(ConvNet())
    assert int(average.n_averaged) == 0


def test_backends() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of \('auto', 'triton', 'torch'\), got 'cuda'"):
        fastswa.AveragedModel(ConvNet(), backend="cuda")


def test_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"backend='triton' can't run here: .*not on cpu; use backend='auto'"):
        fastswa.AveragedModel(ConvNet(), backend="triton")


def test_an_automatic_choice_says_once_why(caplog: pytest.LogCaptureFixture) -> None:
    backends.say_once.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="fastswa"):
        for _ in range(2):
            assert backends.choose("auto", torch.device("mps")) == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "averages on mps are updated by torch: the kernels run on CUDA and ROCm devices, not on mps"
    ]


def test_tensors_without_values() -> None:
    with torch.device("meta"):
        on_meta = ConvNet()
    with pytest.raises(ValueError, match="of the model is on the meta device and holds no values"):
        fastswa.AveragedModel(on_meta)
    with pytest.raises(ValueError, match=r"'0\.weight' of the model is not initialised"):
        fastswa.AveragedModel(nn.Sequential(nn.LazyLinear(3)))
    average = fastswa.AveragedModel(ConvNet())
    with pytest.raises(ValueError, match="of the model is on the meta device"):
        average.update_parameters(on_meta)


def test_a_model_that_cannot_be_copied() -> None:
    model = ConvNet()
    model.hidden.lock = threading.Lock()
    with pytest.raises(RuntimeError, match=r"because of 'hidden\.lock' \(lock\).*WeightAverages.*pass module="):
        fastswa.AveragedModel(model)
    average = fastswa.AveragedModel(model, module=ConvNet())
    average.update_parameters(model)

    computed = nn.Linear(2, 2)
    computed.weight_of_graph = computed.weight * 2
    with pytest.raises(RuntimeError, match="because of 'weight_of_graph'"):
        fastswa.AveragedModel(computed)


def test_a_module_that_does_not_match() -> None:
    with pytest.raises(ValueError, match=r"the average has no parameter 'extra\.weight'"):
        fastswa.AveragedModel(WithExtra(), module=ConvNet())
    model = ConvNet()
    with pytest.raises(ValueError, match="of the averaged module is the model's own"):
        fastswa.AveragedModel(model, module=model)
    sharing = ConvNet()
    sharing.head.weight = model.head.weight
    with pytest.raises(ValueError, match=r"'head\.weight' of the averaged module is the model's own"):
        fastswa.AveragedModel(model, module=sharing)


def test_a_refused_module_is_left_as_it_was() -> None:
    module = ConvNet()
    for arguments in ({"module": module, "backend": "bogus"}, {"module": module, "dtype": torch.int8}):
        with pytest.raises(ValueError, match="must be"):
            fastswa.AveragedModel(ConvNet(), **{"dtype": torch.float64, **arguments})
    with pytest.raises(ValueError, match="the model's own"):
        fastswa.AveragedModel(module, module=module, dtype=torch.float64)
    assert module.head.weight.dtype == torch.float32


def test_a_module_that_shares_only_memory_gets_its_own() -> None:
    model, module = TiedNet(), TiedNet()
    module.layer.weight.data = model.layer.weight.data
    average = fastswa.AveragedModel(model, module=module)
    for _ in range(3):
        train_step(model)
        before = model.layer.weight.detach().clone()
        average.update_parameters(model)
        assert torch.equal(model.layer.weight, before)
    assert not torch.equal(module.layer.weight, model.layer.weight)


def test_dtypes_that_cannot_be_averaged() -> None:
    with pytest.raises(ValueError, match=r"dtype must be a floating dtype, got torch\.int8"):
        fastswa.AveragedModel(ConvNet(), dtype=torch.int8)
    model = nn.Linear(3, 3)
    average = fastswa.AveragedModel(model)
    model.weight.data = model.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"'weight' can't be averaged: .*torch.float8_e4m3fn in the model"):
        average.update_parameters(model)


def test_a_tensor_subclass_is_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    class Marked(torch.Tensor):
        def __deepcopy__(self, _: object) -> torch.Tensor:
            return self.clone()

    model = nn.Linear(4, 4)
    model.register_buffer("marked", torch.ones(3).as_subclass(Marked))
    backends.say_once.cache_clear()
    average, theirs = fastswa.AveragedModel(model), torch.optim.swa_utils.AveragedModel(model)
    with caplog.at_level(logging.DEBUG, logger="fastswa"):
        for _ in range(3):
            train_step(model)
            average.update_parameters(model)
            theirs.update_parameters(model)
    assert caplog.messages == ["torch's own loop updates the average: 'marked' is a Marked"]
    assert all(map(torch.equal, average.state_dict().values(), theirs.state_dict().values()))
    explicit = fastswa.AveragedModel(model, backend="triton")
    with pytest.raises(RuntimeError, match=r"backend='triton' can't update this model: 'marked' is a Marked"):
        explicit.update_parameters(model)


def test_a_scripted_model_is_left_to_torch() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    ours, theirs = fastswa.AveragedModel(scripted), torch.optim.swa_utils.AveragedModel(scripted)
    for _ in range(3):
        train_step(scripted)
        ours.update_parameters(scripted)
        theirs.update_parameters(scripted)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_an_own_function_and_another_order_of_the_parameters() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))

    class Straight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))

    own = fastswa.AveragedModel(Straight(), avg_fn=lambda averaged, current, n: current)
    with pytest.raises(ValueError, match="'a' in another place"):
        own.update_parameters(Swapped())
    fused = fastswa.AveragedModel(Straight())
    fused.update_parameters(Swapped())
    assert fused.module.a[0] == 1


def test_a_failed_update_does_not_count() -> None:
    model = ConvNet()
    average = fastswa.AveragedModel(model)
    average.update_parameters(model)
    twin = deepcopy(average)
    with pytest.raises(ValueError, match="no parameter"):
        average.update_parameters(WithoutHeadNorm())
    train_step(model)
    average.update_parameters(model)
    twin.update_parameters(model)
    assert all(map(torch.equal, average.state_dict().values(), twin.state_dict().values()))
