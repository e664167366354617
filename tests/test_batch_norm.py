"""update_bn as torch's is called: its numbers bit for bit, no host read for each layer, and all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

import fastswa
from tests.batch_norm import (
    NETWORKS,
    Net,
    assert_buffers_equal,
    assert_statistics_close,
    assert_unchanged,
    batches,
    breaking,
    norms,
    state,
    statistics,
    trained,
)


def both(ours: nn.Module, theirs: nn.Module, data: list[object], *arguments: object) -> fastswa.BNUpdateReport:
    """The same pass by fastswa and by torch, with the same dropout."""
    torch.manual_seed(1)
    report = fastswa.update_bn(data, ours, *arguments)  # type: ignore[arg-type]
    torch.manual_seed(1)
    swa_utils.update_bn(data, theirs, *arguments)  # type: ignore[arg-type]
    return report


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: (b, "label"), lambda b: [b]], ids=["tensor", "tuple", "list"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_torch_numbers_bit_for_bit(
    network: type[nn.Module], wrap: Callable[[Tensor], object], device: str | None
) -> None:
    ours = trained(network())
    theirs = deepcopy(ours)
    before = state(ours)
    both(ours, theirs, [wrap(batch) for batch in batches()], device)
    assert_buffers_equal(ours, theirs)
    assert_unchanged(ours, before, values=False)


def test_counters_and_report() -> None:
    net = trained(Net())
    report = fastswa.update_bn(batches(), net)
    assert (report.batches, report.samples, report.never_called) == (5, 35, ())
    assert report.layers == ("norm", "shared", "frozen", "head_norm")
    assert report.worst_standard_error is None
    assert report.seconds > 0
    assert int(net.norm.num_batches_tracked) == 5
    assert int(net.shared.num_batches_tracked) == 10
    assert not net.frozen.training


def test_sync_batch_norm_without_processes() -> None:
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(trained(Net()))
    theirs = deepcopy(ours)
    both(ours, theirs, batches())
    assert isinstance(ours.norm, nn.SyncBatchNorm)
    assert_buffers_equal(ours, theirs)


def test_float64_bit_for_bit() -> None:
    ours = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    theirs = deepcopy(ours)
    both(ours, theirs, [torch.randn(8, 4, dtype=torch.float64) for _ in range(4)])
    assert_buffers_equal(ours, theirs)


def test_half_precision_statistics_do_not_stall() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).bfloat16()
    data = [(torch.randn(16, 3) + number / 300).bfloat16() for number in range(1200)]
    forced, theirs = deepcopy(model), deepcopy(model)
    exact = [
        (
            torch.stack([batch.double().mean(0) for batch in data]).mean(0),
            torch.stack([batch.double().var(0) for batch in data]).mean(0),
        )
    ]
    fastswa.update_bn(data, model)
    # Half an ulp of bfloat16 at the store (2^-9 of a mean of two standard deviations); the batches' own rounding
    # averages out.
    assert_statistics_close(model, exact, 2**-7)
    swa_utils.update_bn(data, theirs)
    with pytest.raises(AssertionError):
        assert_statistics_close(theirs, exact, 0.1)
    fastswa.update_bn(data, forced, engine="eager")
    assert_buffers_equal(forced, theirs)


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


def test_layers_that_share_their_buffers() -> None:
    ours = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(ours[2], name, getattr(ours[0], name))
    theirs = deepcopy(ours)
    merged = deepcopy(ours)
    data = [torch.randn(8, 3) for _ in range(3)]
    both(ours, theirs, data)
    assert int(ours[0].num_batches_tracked) == 6
    assert_buffers_equal(ours, theirs)
    fastswa.update_bn(data, merged, engine="merge")
    # A few float32 roundings in torch's own cumulative average.
    assert_statistics_close(merged, statistics(theirs), 1e-6)
    assert int(merged[0].num_batches_tracked) == 6


FAILURES = {
    "empty": (list, ValueError, "gave no batches"),
    "exhausted": (lambda: iter(()), ValueError, "gave no batches"),
    "raising": (lambda: breaking(OSError("disk"), after=2), OSError, "disk"),
    "interrupted": (lambda: breaking(KeyboardInterrupt(), after=2), KeyboardInterrupt, ""),
    "nan": (lambda: [*batches(2), torch.full((4, 1, 5, 5), float("nan"))], ValueError, r"norm, .*not finite"),
    "infinite": (lambda: [torch.full((4, 1, 5, 5), float("inf"))], ValueError, "not finite"),
    "wrong shape": (lambda: [*batches(2), torch.zeros(3, 7)], RuntimeError, ""),
    "one sample": (lambda: [*batches(2), torch.zeros(1, 1, 5, 5)], ValueError, "more than 1 value per channel"),
    "another argument": (lambda: [*batches(2), {"image": torch.zeros(3, 1, 5, 5)}], TypeError, "image"),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("engine", ["eager", "merge"])
@pytest.mark.parametrize("wrap", [lambda m: m, fastswa.AveragedModel], ids=["model", "average"])
def test_a_failed_pass_changes_nothing(case: str, engine: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    make, error, message = FAILURES[case]
    model = wrap(trained(Net()))
    before = state(model)
    with pytest.raises(error, match=message or None):
        fastswa.update_bn(make(), model, engine=engine)
    assert_unchanged(model, before)


# In evaluation mode a batch of one sample is no failure.
@pytest.mark.parametrize("case", [case for case in FAILURES if case != "one sample"])
def test_a_failed_sweep_changes_nothing(case: str) -> None:
    class SecondTime:
        """The first pass goes well; a sweep sees the failure."""

        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Iterator[object]:
            self.passes += 1
            return iter(batches()) if self.passes < 3 else iter(make())

    make, error, message = FAILURES[case]
    model = trained(Net())
    before = state(model)
    with pytest.raises(error, match=message or None):
        fastswa.update_bn(SecondTime(), model, sweeps=2)
    assert_unchanged(model, before)


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
        fastswa.update_bn((batch[:, 0, :, 0][:, :3] for batch in breaking(OSError("disk"), after=2)), model)
    assert_unchanged(model, before)


def test_the_default_device_is_not_asked() -> None:
    data = [torch.randn(8, 4)]
    for engine in ("eager", "merge"):
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        with torch.device("meta"):
            fastswa.update_bn(data, model, engine=engine)
        assert int(model[1].num_batches_tracked) == 1


class _Reads(TorchDispatchMode):
    """Counts host reads, and which of them would wait for a GPU if the model were there.

    A tensor that was made for the CPU by name would be there all the same; any other lives with the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        self.of_device_tensors = 0
        self._kept: list[Tensor] = []
        self._on_cpu: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.all += 1
            self.of_device_tensors += args[0].untyped_storage().data_ptr() not in self._on_cpu
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.zeros.default and (kwargs or {}).get("device") == torch.device("cpu"):
            # Kept, so that no other tensor gets its address.
            self._kept.append(result)
            self._on_cpu.add(result.untyped_storage().data_ptr())
        return result


def host_reads(update: Callable[..., object], count: int, **options: object) -> _Reads:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(10)))
    with _Reads() as reads:
        update([torch.randn(8, 4) for _ in range(count)], model, **options)
    assert all(int(layer.num_batches_tracked) == count for layer in norms(model))
    return reads


@pytest.mark.parametrize("options", [{}, {"estimator": "weighted"}, {"engine": "merge"}, {"estimator": "population"}])
def test_the_host_reads_no_more_from_the_device_for_more_batches(options: dict[str, object]) -> None:
    few, many = (host_reads(fastswa.update_bn, count, **options) for count in (2, 22))
    assert few.of_device_tensors == many.of_device_tensors
    if options.get("engine") == "merge" or options.get("estimator") == "population":
        assert few.all == many.all
    theirs = [host_reads(swa_utils.update_bn, count).of_device_tensors for count in (2, 22)]
    # Torch's: one for each layer and batch.
    assert theirs[1] - theirs[0] == 10 * 20


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"estimator": "weighted"}, {"engine": "merge"}, {"rtol": 1e-9}])
def test_no_batch_waits_for_the_device(options: dict[str, object]) -> None:
    class Watching:
        def __iter__(self) -> Iterator[Tensor]:
            for number in range(20):
                if number == 1:
                    torch.cuda.set_sync_debug_mode("error")
                yield data[number]
            torch.cuda.set_sync_debug_mode("default")

    model = trained(Net()).cuda()
    data = [torch.randn(8, 1, 5, 5, device="cuda") for _ in range(20)]
    try:
        fastswa.update_bn(Watching(), model, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_gpu_pass_equals_torch(prefetch: bool) -> None:
    ours = trained(Net()).cuda()
    theirs = deepcopy(ours)
    data = batches()
    torch.manual_seed(1)
    fastswa.update_bn(data, ours, "cuda", prefetch=prefetch)
    torch.manual_seed(1)
    swa_utils.update_bn(data, theirs, "cuda")
    # The same kernels with the same factor.
    assert_buffers_equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gpu_pass_under_autocast(channels_last: bool) -> None:
    ours = trained(Net()).cuda()
    if channels_last:
        ours = ours.to(memory_format=torch.channels_last)
    theirs = deepcopy(ours)
    data = [batch.cuda() for batch in batches()]
    for function, model in ((fastswa.update_bn, ours), (swa_utils.update_bn, theirs)):
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16):
            function(data, model)
    assert_buffers_equal(ours, theirs)
