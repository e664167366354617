"""update_bn: torch's numbers bit for bit, no host read for each layer, and all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

import fastswa


class Net(nn.Module):
    """BatchNorm of both ranks, one without statistics, one frozen, one called twice, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.shared = nn.BatchNorm2d(6, momentum=None)
        self.plain = nn.BatchNorm2d(6, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(6, momentum=0.3)
        self.frozen.eval()
        self.instance = nn.InstanceNorm2d(6, track_running_stats=True)
        self.drop = nn.Dropout(0.2)
        self.head_norm = nn.BatchNorm1d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.norm(self.conv(x)).relu())
        x = self.frozen(self.plain(self.shared(x)))
        return self.head_norm(self.drop(self.instance(x)).mean((2, 3)))


def batches(count: int = 5) -> list[Tensor]:
    return [torch.randn(8, 1, 5, 5) * 3 + 2 for _ in range(count - 1)] + [torch.randn(3, 1, 5, 5)]


def trained(net: nn.Module) -> nn.Module:
    for _ in range(3):
        net(torch.randn(8, 1, 5, 5))
    return net


def state(model: nn.Module) -> dict[str, object]:
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "addresses": [tensor.data_ptr() for tensor in model.buffers()],
        "modes": [module.training for module in model.modules()],
        "momenta": [getattr(module, "momentum", None) for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, object], values: bool = True) -> None:
    now = state(model)
    if values:
        old = before["values"]
        assert all(torch.equal(tensor, old[name]) for name, tensor in now["values"].items())  # type: ignore[index, union-attr]
    for key in ("identities", "addresses", "modes", "momenta"):
        assert now[key] == before[key], key


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: (b, "label"), lambda b: [b]], ids=["tensor", "tuple", "list"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_torch_numbers_bit_for_bit(wrap: Callable[[Tensor], object], device: str | None) -> None:
    ours = trained(Net())
    theirs = deepcopy(ours)
    before = state(ours)
    data = [wrap(batch) for batch in batches()]
    for function, model in ((fastswa.update_bn, ours), (swa_utils.update_bn, theirs)):
        torch.manual_seed(1)  # dropout
        function(data, model, device)
    assert int(ours.norm.num_batches_tracked) == 5
    assert int(ours.shared.num_batches_tracked) == 10
    for (name, tensor), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert_unchanged(ours, before, values=False)
    assert not ours.frozen.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_other_dtypes_bit_for_bit(dtype: torch.dtype) -> None:
    ours = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(dtype)
    theirs = deepcopy(ours)
    data = [torch.randn(8, 4, dtype=dtype) for _ in range(4)]
    fastswa.update_bn(data, ours)
    swa_utils.update_bn(data, theirs)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_an_averaged_model_and_a_generator() -> None:
    model = trained(Net())
    ours, theirs = fastswa.AveragedModel(model), swa_utils.AveragedModel(model)
    data = batches()
    for function, average in ((fastswa.update_bn, ours), (swa_utils.update_bn, theirs)):
        average.update_parameters(model)
        torch.manual_seed(1)
        function((batch for batch in data), average)
    for tensor, other in zip(ours.module.buffers(), theirs.module.buffers(), strict=True):
        assert torch.equal(tensor, other)
    # The average's prepared update still points at the right memory.
    ours.update_parameters(model)
    assert torch.equal(ours.module.norm.running_mean, model.norm.running_mean)


def test_a_model_without_batch_norm_reads_no_data() -> None:
    fastswa.update_bn(iter_that_raises(ValueError("read")), nn.Linear(2, 2))


def iter_that_raises(error: BaseException, after: int = 0) -> Iterator[Tensor]:
    yield from batches(after + 1)[:after]
    raise error


FAILURES = {
    "empty": (list, ValueError, "gave no batches"),
    "exhausted": (lambda: iter(()), ValueError, "gave no batches"),
    "raising": (lambda: iter_that_raises(OSError("disk"), after=2), OSError, "disk"),
    "interrupted": (lambda: iter_that_raises(KeyboardInterrupt(), after=2), KeyboardInterrupt, ""),
    "nan": (lambda: [*batches(2), torch.full((4, 1, 5, 5), float("nan"))], ValueError, r"norm, .*not finite"),
    "infinite": (lambda: [torch.full((4, 1, 5, 5), float("inf"))], ValueError, "not finite"),
    "wrong shape": (lambda: [*batches(2), torch.zeros(3, 7)], RuntimeError, ""),
    "a dict": (lambda: [*batches(2), {"x": torch.zeros(3, 1, 5, 5)}], TypeError, ""),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("wrap", [lambda m: m, fastswa.AveragedModel], ids=["model", "average"])
def test_a_failed_pass_changes_nothing(case: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    make, error, message = FAILURES[case]
    model = wrap(trained(Net()))
    before = state(model)
    with pytest.raises(error, match=message or None):
        fastswa.update_bn(make(), model)
    assert_unchanged(model, before)


def test_a_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    model = trained(Net())
    model.unused = nn.BatchNorm1d(4)
    model.unused.running_mean.fill_(3)
    with pytest.warns(UserWarning, match="no batch reached unused; their statistics are kept"):
        fastswa.update_bn(batches(), model)
    assert (model.unused.running_mean == 3).all()


def test_a_layer_that_the_model_keeps_frozen_goes_on_with_its_own_statistics() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self[0].eval()
            return self

    model = Frozen(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).train()
    model[0].running_mean.fill_(5)
    model[0].running_var.fill_(9)
    data = [torch.randn(20, 3) for _ in range(4)]
    fastswa.update_bn(data, model)
    assert (model[0].running_mean == 5).all()
    seen = [(batch - 5) / (9 + model[0].eps) ** 0.5 for batch in data]
    expected = torch.stack([batch.mean(0) for batch in seen]).mean(0)
    # Four float32 means of values near -5/3.
    assert torch.allclose(model[1].running_mean, expected, rtol=0, atol=1e-5)


def test_layers_that_share_their_buffers() -> None:
    ours = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(ours[2], name, getattr(ours[0], name))
    theirs = deepcopy(ours)
    data = [torch.randn(8, 3) for _ in range(3)]
    fastswa.update_bn(data, ours)
    swa_utils.update_bn(data, theirs)
    assert int(ours[0].num_batches_tracked) == 6
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_the_default_device_is_not_asked() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    data = [torch.randn(8, 4)]
    with torch.device("meta"):
        fastswa.update_bn(data, model)
    assert int(model[1].num_batches_tracked) == 1


def test_buffers_that_a_failed_pass_replaced_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.norm(x)

    model = Counting()
    before = state(model)
    with pytest.raises(OSError, match="disk"):
        fastswa.update_bn((batch[:, 0, :, 0][:, :3] for batch in iter_that_raises(OSError("disk"), after=2)), model)
    assert_unchanged(model, before)


def test_layers_without_values_and_scripted_models() -> None:
    with pytest.raises(ValueError, match=r"1\.running_mean holds no values"):
        fastswa.update_bn(batches(), nn.Sequential(nn.Conv2d(1, 2, 3), nn.LazyBatchNorm2d()))
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    with pytest.raises(TypeError, match=r"torch\.jit\.script"):
        fastswa.update_bn([torch.randn(4, 4)], scripted)


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of_device_counters = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A counter that lives with the model would be on the GPU there; the pass's own are on the CPU by construction,
        # so what matters is that the model's are neither read nor written batch by batch.
        if any(isinstance(argument, Tensor) and id(argument) in self.watched for argument in args):
            self.of_device_counters += 1
        return func(*args, **(kwargs or {}))


def test_the_models_counters_are_touched_once_for_a_pass_not_for_a_batch() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(10)))
    counters = [module.num_batches_tracked for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    with _Reads() as reads:
        reads.watched = {id(counter) for counter in counters}
        fastswa.update_bn([torch.randn(8, 4) for _ in range(20)], model)
    assert reads.of_device_counters <= 2 * len(counters)
    assert all(int(counter) == 20 for counter in counters)


@pytest.mark.gpu
def test_no_layer_waits_for_the_device() -> None:
    class Watching:
        def __iter__(self) -> Iterator[Tensor]:
            for _ in range(5):
                yield torch.randn(8, 1, 5, 5, device="cuda")
                torch.cuda.set_sync_debug_mode("error")
            torch.cuda.set_sync_debug_mode("default")

    model = trained(Net()).cuda()
    fastswa.update_bn(Watching(), model)


@pytest.mark.gpu
def test_a_gpu_pass_equals_torch() -> None:
    ours = trained(Net()).cuda()
    theirs = deepcopy(ours)
    data = [batch.cuda() for batch in batches()]
    for function, model in ((fastswa.update_bn, ours), (swa_utils.update_bn, theirs)):
        torch.manual_seed(1)
        function(data, model)
    for (name, tensor), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        # The same kernels with the same factor.
        assert torch.equal(tensor, other), name
