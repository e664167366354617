"""torch.optim.swa_utils handing out fastswa's class, and giving torch's back."""

from __future__ import annotations

import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import fastswa
from fastswa import accelerate_torch, restore_torch
from tests.models import ConvNet, assert_same_average, update_both

TORCH_CLASS = swa_utils.AveragedModel
TORCH_UPDATE_BN = swa_utils.update_bn
TAKES_FROM_TORCH = "from torch.optim.swa_utils import AveragedModel, update_bn as recompute, get_ema_avg_fn"
TAKES_FROM_FASTSWA = "from fastswa import AveragedModel, update_bn as recompute"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    restore_torch()
    assert swa_utils.AveragedModel is TORCH_CLASS
    assert swa_utils.update_bn is TORCH_UPDATE_BN
    assert not hasattr(swa_utils, "__getattr__")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """Makes a module of a source text, as an import would."""

    def make(name: str, text: str) -> ModuleType:
        made = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        exec(text, vars(made))
        return made

    return make


def hands_out_ours() -> bool:
    ours = swa_utils.AveragedModel is fastswa.AveragedModel
    assert ours == (swa_utils.update_bn is fastswa.update_bn)
    return ours


def test_torch_hands_out_ours_and_then_its_own() -> None:
    assert not hands_out_ours()
    assert accelerate_torch().patched[:2] == ["torch.optim.swa_utils.AveragedModel", "torch.optim.swa_utils.update_bn"]
    assert hands_out_ours()
    # What there was besides is there still, and what there was not is missed as before.
    assert swa_utils.get_ema_avg_fn(0.5)(torch.zeros(1), torch.ones(1), 1) == 0.5
    with pytest.raises(AttributeError, match=r"'torch\.optim\.swa_utils' has no attribute 'AverageModel'"):
        swa_utils.AverageModel  # noqa: B018
    restore_torch()
    assert not hands_out_ours()


def test_importing_fastswa_replaces_nothing() -> None:
    # The tests' first import of fastswa came before this file took torch's names.
    assert TORCH_CLASS.__module__ == TORCH_UPDATE_BN.__module__ == "torch.optim.swa_utils"
    assert fastswa.AveragedModel.__bases__ == (TORCH_CLASS,)


def test_modules_that_took_the_names_before(module: Callable[[str, str], ModuleType]) -> None:
    before = module("before", TAKES_FROM_TORCH)
    ours = module("ours", TAKES_FROM_FASTSWA)
    with accelerate_torch() as acceleration:
        assert before.AveragedModel is fastswa.AveragedModel
        assert before.recompute is fastswa.update_bn
        assert {"before.AveragedModel", "before.recompute"} < set(acceleration.patched)
        assert f"{__name__}.TORCH_CLASS" in acceleration.patched
        assert "before.AveragedModel" in repr(acceleration)
    # This very module's names were replaced, too, and are torch's again.
    assert before.AveragedModel is TORCH_CLASS is swa_utils.AveragedModel
    assert before.recompute is TORCH_UPDATE_BN
    assert ours.AveragedModel is fastswa.AveragedModel
    assert repr(acceleration).startswith("ended")


def test_modules_that_took_the_names_meanwhile(module: Callable[[str, str], ModuleType]) -> None:
    with accelerate_torch():
        meanwhile = module("meanwhile", TAKES_FROM_TORCH)
        star = module("star", "from torch.optim.swa_utils import *")
        ours = module("ours", TAKES_FROM_FASTSWA)
        assert meanwhile.AveragedModel is star.AveragedModel is fastswa.AveragedModel
    assert meanwhile.AveragedModel is star.AveragedModel is TORCH_CLASS
    assert meanwhile.recompute is TORCH_UPDATE_BN
    assert ours.AveragedModel is fastswa.AveragedModel
    assert ours.recompute is fastswa.update_bn


def test_a_module_with_ours_that_asks_torch_meanwhile_keeps_ours(module: Callable[[str, str], ModuleType]) -> None:
    asks = "from torch.optim import swa_utils\ndef ask(): return swa_utils.AveragedModel"
    both = module("both", f"{TAKES_FROM_FASTSWA}\n{asks}")
    with accelerate_torch():
        assert both.ask() is fastswa.AveragedModel
    assert both.AveragedModel is fastswa.AveragedModel
    assert both.ask() is TORCH_CLASS


def test_a_name_that_somebody_else_replaced_meanwhile_is_left(
    module: Callable[[str, str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = module("before", TAKES_FROM_TORCH)
    monkeypatch.setattr(swa_utils, "update_bn", TORCH_UPDATE_BN)
    with accelerate_torch():
        before.AveragedModel = swa_utils.update_bn = nn.Linear
    assert before.AveragedModel is swa_utils.update_bn is nn.Linear
    monkeypatch.undo()


def test_contexts_count_and_calls_do_not() -> None:
    with accelerate_torch() as outer:
        with accelerate_torch() as inner:
            assert inner.patched == outer.patched
        assert hands_out_ours()
    assert not hands_out_ours()
    accelerate_torch()
    accelerate_torch()
    with accelerate_torch():
        pass
    # A context inside does not end what was begun for the whole process, and one call ends all of it.
    assert hands_out_ours()
    restore_torch()
    assert not hands_out_ours()
    restore_torch()
    with accelerate_torch():
        restore_torch()
        assert not hands_out_ours()
    assert not hands_out_ours()


def test_an_error_inside_restores() -> None:
    with pytest.raises(KeyError), accelerate_torch():
        raise KeyError
    assert not hands_out_ours()


def test_threads_share_it() -> None:
    threads, rounds = 8, 20
    barrier = threading.Barrier(threads)
    seen: list[bool] = []

    def work() -> None:
        barrier.wait()
        for _ in range(rounds):
            with accelerate_torch():
                seen.append(swa_utils.AveragedModel is fastswa.AveragedModel)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [True] * (threads * rounds)
    assert not hands_out_ours()


def test_subclasses_have_the_base_that_there_was() -> None:
    class Before(swa_utils.AveragedModel):
        pass

    with accelerate_torch():

        class Meanwhile(swa_utils.AveragedModel):
            pass

        assert not isinstance(Before(ConvNet()), fastswa.AveragedModel)
    assert Before.__bases__ == (TORCH_CLASS,)
    model = ConvNet()
    ours, theirs = (
        Meanwhile(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.7)),
        Before(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.7)),
    )
    assert isinstance(ours, fastswa.AveragedModel)
    update_both(model, ours, theirs, steps=4)
    assert ours._update is not None
    assert_same_average(ours, theirs, steps=4)


@pytest.mark.parametrize("arguments", [{}, {"avg_fn": 0.9}, {"multi_avg_fn": 0.9, "use_buffers": True}])
def test_numbers_are_those_of_torch(arguments: dict[str, object]) -> None:
    factories = {"avg_fn": swa_utils.get_ema_avg_fn, "multi_avg_fn": swa_utils.get_ema_multi_avg_fn}
    arguments = {name: factories[name](value) if name in factories else value for name, value in arguments.items()}
    # Without integer buffers, which torch truncates where it averages buffers.
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)).double()
    theirs = swa_utils.AveragedModel(model, **arguments)
    with accelerate_torch():
        ours = swa_utils.AveragedModel(model, **arguments)
        update_both(model, ours, theirs, steps=6)
    assert ours._update is not None
    assert theirs.__class__ is TORCH_CLASS
    assert_same_average(ours, theirs, steps=6)
    theirs.load_state_dict(ours.state_dict())


def test_update_bn_is_fast_and_has_torchs_numbers() -> None:
    model = ConvNet()
    twin = deepcopy(model)
    loader = [torch.randn(6, 1, 8, 8) for _ in range(3)]
    swa_utils.update_bn(loader, twin)
    with accelerate_torch():
        assert isinstance(swa_utils.update_bn(loader, model), fastswa.BNUpdateReport)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name


def through_torch_save(average: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(average, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [deepcopy, lambda average: pickle.loads(pickle.dumps(average)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
@pytest.mark.parametrize("made_meanwhile", [False, True])
def test_averages_are_copied_and_saved_while_it_lasts_and_after(
    copied: Callable[[nn.Module], nn.Module], made_meanwhile: bool
) -> None:
    model = ConvNet()
    with accelerate_torch():
        own = swa_utils.AveragedModel if made_meanwhile else TORCH_CLASS_IN_A_LIST[0]
        average = own(model)
        update_both(model, average)
        meanwhile = copied(average)
    after = copied(average)
    update_both(model, average, meanwhile, after)
    assert meanwhile.__class__ is after.__class__ is own
    for twin in (meanwhile, after):
        assert int(twin.n_averaged) == 4
        assert_same_average(twin, average)


# Names in a list are not reached.
TORCH_CLASS_IN_A_LIST = [swa_utils.AveragedModel]
