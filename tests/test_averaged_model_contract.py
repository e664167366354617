"""AveragedModel keeps torch's contract: state, copies, moves, wrappers, subclasses."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastswa
from tests.models import ConvNet, TiedNet, assert_same_average, train_step, update_both


def test_it_is_a_torch_averaged_model_with_torch_positional_order() -> None:
    model = ConvNet()
    average = fastswa.AveragedModel(model, "cpu", None, fastswa.EMA(0.5), True)
    assert isinstance(average, swa_utils.AveragedModel)
    assert (average.avg_fn, average.multi_avg_fn, average.use_buffers) == (None, fastswa.EMA(0.5), True)
    assert list(average.state_dict()) == list(swa_utils.AveragedModel(model).state_dict())


def test_state_dict_goes_both_ways_in_mid_run() -> None:
    model = ConvNet()
    ours, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    update_both(model, ours, theirs, steps=3)
    ours_resumed, theirs_resumed = fastswa.AveragedModel(ConvNet()), swa_utils.AveragedModel(ConvNet())
    # Used before the load, so that a count of its own has to give way.
    update_both(ConvNet(), ours_resumed, theirs_resumed, steps=5)
    ours_resumed.load_state_dict(theirs.state_dict())
    theirs_resumed.load_state_dict(ours.state_dict())
    update_both(model, ours, theirs, ours_resumed, theirs_resumed, steps=3)
    assert int(ours.n_averaged) == int(ours_resumed.n_averaged) == int(theirs_resumed.n_averaged) == 6
    for other in (ours_resumed, theirs_resumed, theirs):
        assert_same_average(ours, other)


def test_loading_with_assign_is_noticed() -> None:
    model = ConvNet()
    ours, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    update_both(model, ours, theirs)
    for average in (ours, theirs):
        average.load_state_dict({name: t.clone() for name, t in theirs.state_dict().items()}, assign=True)
    update_both(model, ours, theirs)
    assert_same_average(ours, theirs)


def test_a_reset_of_the_counter_starts_the_average_anew() -> None:
    model = ConvNet()
    average = fastswa.AveragedModel(model)
    update_both(model, average, steps=4)
    average.n_averaged.zero_()
    update_both(model, average, steps=1)
    assert torch.equal(average.module.head.weight, model.head.weight)
    assert int(average.n_averaged) == 1
    average.n_averaged = torch.tensor(0)
    update_both(model, average, steps=1)
    assert torch.equal(average.module.head.weight, model.head.weight)


@pytest.mark.parametrize(
    "copied",
    [deepcopy, lambda average: pickle.loads(pickle.dumps(average)), lambda average: _saved_and_loaded(average)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_go_on_alone(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = ConvNet()
    arguments = {"multi_avg_fn": fastswa.get_ema_multi_avg_fn(0.7), "use_buffers": True}
    ours = fastswa.AveragedModel(model, **arguments)
    update_both(model, ours, steps=2)
    twin = copied(ours)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    other = deepcopy(model)
    update_both(other, twin, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    assert int(twin.n_averaged) == 4
    again = copied(twin)
    update_both(other, twin, again, steps=2)
    assert_same_average(twin, again)


def _saved_and_loaded(average: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(average, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "move",
    [
        lambda average: average.double(),
        lambda average: average.half(),
        lambda average: average.to(torch.bfloat16),
        lambda average: average.module.double(),
        lambda average: average.module.head.double(),
        lambda average: average.to(memory_format=torch.channels_last),
        lambda average: setattr(average.module.head.weight, "data", average.module.head.weight.data.clone()),
        lambda average: setattr(average.module.head.bias, "data", average.module.head.bias.data.clone()),
        lambda average: setattr(average.module, "head", deepcopy(average.module.head)),
        lambda average: setattr(average.module.norm, "running_mean", torch.zeros(8)),
    ],
    ids=["double", "half", "bfloat16", "module", "layer", "channels_last", "data", "bias_data", "replaced", "buffer"],
)
@pytest.mark.parametrize("alias", [False, True], ids=["", "state_dict_held"])
def test_moves_of_the_average_between_updates(
    move: Callable[[nn.Module], object], alias: bool, request: pytest.FixtureRequest
) -> None:
    # One tensor's memory exchanged by hand while the old is held elsewhere: the limit that README names.
    alias = alias and "bias_data" not in request.node.name
    model = ConvNet()
    ours, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    update_both(model, ours, theirs)
    held = ours.state_dict() if alias else {}
    for average in (ours, theirs):
        move(average)
    update_both(model, ours, theirs)
    assert_same_average(ours, theirs)
    assert bool(held) == alias  # alive until here


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.head, "weight", nn.Parameter(torch.randn(3, 300))),
        lambda model: setattr(model.head_norm.weight, "data", torch.randn(300)),
        lambda model: setattr(model.hidden.weight, "data", torch.randn(300, 288)),
        lambda model: setattr(model.head.weight, "data", torch.randn(3, 300)),
        lambda model: setattr(model, "head", nn.Linear(300, 3)),
        lambda model: setattr(model.norm, "running_mean", torch.randn(8)),
        lambda model: setattr(model.norm.num_batches_tracked, "data", torch.tensor(77)),
        lambda model: model.load_state_dict(ConvNet().state_dict(), assign=True),
        lambda model: model.double(),
        lambda model: model.head_norm.double(),
        lambda model: setattr(model.head_norm.bias, "data", torch.randn(300, dtype=torch.float64)),
    ],
    ids=[
        "parameter", "small_data", "large_data", "matrix_data", "layer", "buffer", "counter_data", "assign",
        "double", "layer_double", "data_double",
    ],
)  # fmt: skip
def test_changes_to_the_model_between_updates(change: Callable[[nn.Module], object]) -> None:
    model = ConvNet()
    ours, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    update_both(model, ours, theirs, steps=3)
    change(model)
    ours.update_parameters(model)
    theirs.update_parameters(model)
    assert_same_average(ours, theirs)
    update_both(model, ours, theirs)
    assert_same_average(ours, theirs)


def test_a_compiled_model_updates_and_is_averaged() -> None:
    model = ConvNet()
    compiled = torch.compile(model, backend="eager")
    ours, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    for average in (ours, theirs):
        average.update_parameters(compiled)
    train_step(model)
    for average in (ours, theirs):
        average.update_parameters(compiled)
    assert_same_average(ours, theirs)
    of_compiled = fastswa.AveragedModel(compiled)
    assert list(of_compiled.state_dict()) == list(swa_utils.AveragedModel(compiled).state_dict())
    of_compiled.update_parameters(model)
    assert torch.equal(of_compiled.module.head.weight, model.head.weight)


@pytest.fixture
def process_group(tmp_path: object) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_distributed_model_updates_and_is_averaged() -> None:
    model = ConvNet()
    # The net's empty parameter gets no gradient.
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    ours, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    for _ in range(3):
        wrapped(torch.randn(4, 1, 8, 8)).sum().backward()
        train_step(model)
        for average in (ours, theirs):
            average.update_parameters(wrapped)
    assert_same_average(ours, theirs)
    of_wrapped = fastswa.AveragedModel(wrapped)
    of_wrapped.update_parameters(model)
    assert torch.equal(of_wrapped.module.module.head.weight, model.head.weight)


def test_a_subclass_that_skips_init_and_swaps_the_function() -> None:
    class Skipping(fastswa.AveragedModel):
        def __init__(self, model: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = deepcopy(model)
            self.register_buffer("n_averaged", torch.tensor(0))
            self.avg_fn = None
            self.multi_avg_fn = None
            self.use_buffers = False

    model = ConvNet()
    ours, theirs = Skipping(model), swa_utils.AveragedModel(model)
    for step in range(5):
        train_step(model)
        for average in (ours, theirs):
            average.multi_avg_fn = swa_utils.get_ema_multi_avg_fn(0.5 + step / 10)
            average.update_parameters(model)
    assert_same_average(ours, theirs)


def test_switching_use_buffers_between_updates() -> None:
    model = TiedNet()
    model.register_buffer("scale", torch.randn(4))
    ours, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    for use_buffers in (False, True, True, False, True):
        train_step(model)
        for average in (ours, theirs):
            average.use_buffers = use_buffers
            average.update_parameters(model)
    assert_same_average(ours, theirs)


def test_a_function_of_the_users_own_runs_as_in_torch() -> None:
    def largest(averaged: Tensor, current: Tensor, num_averaged: Tensor) -> Tensor:
        return torch.maximum(averaged, current) + num_averaged

    def largest_of_all(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        for one, other in zip(averaged, current, strict=True):
            one.copy_(largest(one, other, num_averaged))

    model = TiedNet()
    for arguments in ({"avg_fn": largest}, {"multi_avg_fn": largest_of_all}):
        ours, theirs = fastswa.AveragedModel(model, **arguments), swa_utils.AveragedModel(model, **arguments)
        update_both(model, ours, theirs, steps=4)
        for tensor, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(tensor, other)


def test_a_rule_serves_torch_averaged_model_and_lists() -> None:
    model = ConvNet()
    ours = swa_utils.AveragedModel(model, multi_avg_fn=fastswa.EMA(0.7), use_buffers=True)
    theirs = fastswa.AveragedModel(model, multi_avg_fn=fastswa.EMA(0.7), use_buffers=True)
    update_both(model, ours, theirs, steps=4)
    assert_same_average(ours, theirs)
    averaged = [torch.zeros(3), torch.zeros(2, 2)]
    fastswa.SWA()(averaged, [torch.ones(3), torch.ones(2, 2)], 3)
    assert all((tensor == 0.25).all() for tensor in averaged)
    fastswa.SWA()([], [], 3)


def test_the_small_layers_saved_alone_are_small_files() -> None:
    model = ConvNet(width=40)
    average = fastswa.AveragedModel(model)
    update_both(model, average)
    file = io.BytesIO()
    torch.save(average.module.head.state_dict(), file)
    assert file.getbuffer().nbytes < 3 * 4 * (model.head.weight.numel() + 3)
    assert all(
        tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in average.state_dict().values() if tensor.numel()
    )


def test_a_ready_module_holds_the_average() -> None:
    model = ConvNet()
    module = ConvNet()
    average = fastswa.AveragedModel(model, module=module)
    assert average.module is module
    average.update_parameters(model)
    assert torch.equal(module.head.weight, model.head.weight)
    assert module.head.weight.data_ptr() != model.head.weight.data_ptr()
