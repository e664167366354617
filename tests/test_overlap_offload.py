"""Updates on a side stream, and averages on the CPU in a thread."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.optim import optimizer as optimizers

from fastswa import offload as module
from fastswa.offload import SLOTS, Average, Offload
from fastswa.overlap import SideStream

LONG = 200_000_000
"""Cycles, about 0.1 s: far longer than the host needs to go on."""
PATIENCE = 30
"""Seconds after which a wait has failed."""


class Recorder:
    """Makes functions that note what was staged; they may be held back, and the next one may fail."""

    def __init__(self) -> None:
        self.values: list[list[Tensor]] = []
        self.flags: list[bool | None] = []
        self.staged: list[Sequence[Tensor]] = []
        self.begun = threading.Semaphore(0)
        self.may_go = threading.Event()
        self.may_go.set()
        self.error: BaseException | None = None

    def make(self, staged: Sequence[Tensor]) -> Average:
        self.staged.append(staged)

        def average(skip: Tensor | None) -> None:
            self.begun.release()
            assert self.may_go.wait(PATIENCE)
            error, self.error = self.error, None
            if error is not None:
                raise error
            self.values.append([tensor.clone() for tensor in staged])
            self.flags.append(None if skip is None else bool(skip))

        return average


def mixture(device: str = "cpu") -> list[Tensor]:
    return [
        torch.randn(3, 4, device=device),
        torch.randn(5, device=device).bfloat16(),
        torch.randn(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last),
        torch.tensor(7, device=device),
        torch.randn(4, 6, device=device)[:, ::2],
        torch.randn(0, 3, device=device),
        torch.randn(3, device=device, dtype=torch.complex64),
        torch.tensor([True, False], device=device),
    ]


def test_each_slot_holds_views_of_one_buffer_for_each_dtype() -> None:
    sources, recorder = mixture(), Recorder()
    Offload(sources, recorder.make)
    assert len(recorder.staged) == SLOTS
    for staged in recorder.staged:
        assert [(t.shape, t.dtype) for t in staged] == [(t.shape, t.dtype) for t in sources]
        assert staged[2].is_contiguous(memory_format=torch.channels_last)
        storages = {(t.dtype, t.untyped_storage().data_ptr()) for t in staged}
        assert len(storages) == len({t.dtype for t in sources})
    first, second = recorder.staged
    assert first[0].data_ptr() != second[0].data_ptr()


def test_the_values_are_those_of_the_call() -> None:
    sources, recorder = mixture(), Recorder()
    offload = Offload(sources, recorder.make)
    recorder.may_go.clear()
    expected = []
    for _ in range(SLOTS):
        expected.append([source.clone() for source in sources])
        offload.update()
        for source in sources:
            source.copy_(torch.zeros_like(source) if source.dtype == torch.bool else source + 1)
    recorder.may_go.set()
    offload.wait()
    assert len(recorder.values) == SLOTS
    for values, exact in zip(recorder.values, expected, strict=True):
        assert all(map(torch.equal, values, exact))


def test_sources_may_be_parameters_and_inference_tensors() -> None:
    with torch.inference_mode():
        recorder = Recorder()
        offload = Offload([torch.ones(2)], recorder.make)
        offload.update()
        offload.wait()
    with_gradient = torch.nn.Parameter(torch.ones(2))
    other = Offload([with_gradient], recorder.make)
    other.update()
    other.wait()
    offload.update()
    offload.wait()
    assert not any(tensor.is_inference() or tensor.requires_grad for values in recorder.values for tensor in values)
    assert not any(tensor.is_inference() for staged in recorder.staged for tensor in staged)


def test_the_thread_computes_no_gradients() -> None:
    enabled: list[bool] = []
    offload = Offload([torch.ones(1)], lambda staged: lambda skip: enabled.append(torch.is_grad_enabled()))
    offload.update()
    offload.wait()
    assert enabled == [False]


def test_the_queue_is_bounded() -> None:
    recorder = Recorder()
    offload = Offload([torch.ones(1)], recorder.make)
    recorder.may_go.clear()
    for _ in range(SLOTS):
        offload.update()
    assert recorder.begun.acquire(timeout=PATIENCE)
    third_done = threading.Event()
    third = threading.Thread(target=lambda: (offload.update(), third_done.set()))
    third.start()
    # Long enough that an update that does not block would have set it.
    assert not third_done.wait(0.3)
    recorder.may_go.set()
    assert third_done.wait(PATIENCE)
    third.join()
    offload.wait()
    assert len(recorder.values) == SLOTS + 1


@pytest.mark.parametrize("skip", [None, torch.tensor(0.0), torch.tensor([1.0]), torch.tensor(float("nan"))])
def test_the_flag_is_passed_on(skip: Tensor | None) -> None:
    recorder = Recorder()
    offload = Offload([torch.ones(1)], recorder.make)
    offload.update(skip)
    offload.wait()
    assert recorder.flags == [None if skip is None else bool(skip)]


def fail_in_the_thread(recorder: Recorder, offload: Offload) -> None:
    """Hand over an update that fails while a second one waits behind it."""
    recorder.may_go.clear()
    recorder.error = ArithmeticError("spoilt")
    for _ in range(SLOTS):
        offload.update()
    recorder.may_go.set()


@pytest.mark.parametrize("call", [Offload.update, Offload.wait])
def test_an_error_is_raised_once_and_later_updates_are_left_out(call: Callable[[Offload], None]) -> None:
    recorder = Recorder()
    offload = Offload([torch.ones(1)], recorder.make)
    fail_in_the_thread(recorder, offload)
    with pytest.raises(ArithmeticError, match="spoilt") as caught:
        call(offload)
    assert "average" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    offload.wait()
    assert recorder.values == []  # nor was the second one run behind our back
    for _ in range(SLOTS + 1):
        offload.update()
    offload.wait()
    assert len(recorder.values) == SLOTS + 1


def test_an_update_that_cannot_begin_leaves_its_slot_free() -> None:
    recorder = Recorder()
    offload = Offload([torch.ones(1)], recorder.make)
    for _ in range(SLOTS + 1):
        with pytest.raises(RuntimeError):
            offload.update(torch.zeros(2))
    offload.update()
    offload.wait()
    assert len(recorder.values) == 1


def test_sources_on_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        Offload([torch.ones(1), torch.ones(1, device="meta")], Recorder().make)


def offload_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastswa-offload"]


def test_deletion_finishes_the_work_and_ends_the_thread() -> None:
    before = offload_threads()
    recorder = Recorder()
    offload = Offload([torch.ones(1)], recorder.make)
    (thread,) = set(offload_threads()) - set(before)
    offload.update()
    offload.update()
    del offload
    assert not thread.is_alive()
    assert len(recorder.values) == SLOTS


class Owner:
    """Holds an Offload whose function holds the owner, as an average would."""

    def __init__(self) -> None:
        self.total = torch.zeros(1)
        self.offload = Offload([torch.ones(1)], lambda staged: lambda skip: self.take(staged))

    def take(self, staged: Sequence[Tensor]) -> None:
        self.total += staged[0]


def test_the_thread_keeps_no_owner_alive() -> None:
    before = offload_threads()
    owner = Owner()
    (thread,) = set(offload_threads()) - set(before)
    owner.offload.update()
    owner.offload.wait()
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None
    thread.join(PATIENCE)
    assert not thread.is_alive()


PROGRAM = """
import time, torch
from fastswa.offload import Offload

def make(staged):
    def average(skip):
        time.sleep(0.3)  # the main program has ended by then
        {body}
    return average

offload = Offload([torch.ones(1)], make)
offload.update()
offload.update()
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "del offload", "keep = [offload]; keep.append(keep)"])
def test_nothing_is_lost_at_exit(end: str) -> None:
    program = PROGRAM.format(body='print("done", float(staged[0]), flush=True)', end=end)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == "done 1.0\n" * 2
    assert result.stderr == ""


def test_an_error_that_nobody_raised_is_shown_at_exit() -> None:
    program = PROGRAM.format(body='raise ArithmeticError("spoilt")', end="")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stderr.count("ArithmeticError: spoilt") == 1


class Counted(SideStream):
    """Counts the calls of `wait`."""

    waits = 0

    def wait(self) -> None:
        self.waits += 1
        super().wait()


def take_a_step(device: str = "cpu") -> Tensor:
    weight = torch.nn.Parameter(torch.ones(2, device=device))
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()
    return weight.detach()


def test_on_the_cpu_the_work_is_done_at_once() -> None:
    done: list[str] = []
    side = SideStream(torch.device("cpu"))
    side.run(lambda: done.append("now"))
    assert done == ["now"]
    side.wait()


def test_every_optimizer_step_waits() -> None:
    side, other = Counted(torch.device("cpu")), Counted(torch.device("cpu"))
    take_a_step()
    take_a_step()
    assert (side.waits, other.waits) == (2, 2)


def test_the_hook_goes_with_the_side_stream() -> None:
    before = dict(optimizers._global_optimizer_pre_hooks)
    side = SideStream(torch.device("cpu"))
    assert len(optimizers._global_optimizer_pre_hooks) == len(before) + 1
    del side
    assert dict(optimizers._global_optimizer_pre_hooks) == before
    take_a_step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda side: pickle.loads(pickle.dumps(side))])
def test_a_copy_has_a_hook_of_its_own(duplicate: Callable[[Counted], Counted]) -> None:
    side = Counted(torch.device("cpu"))
    other = duplicate(side)
    take_a_step()
    assert (side.waits, other.waits) == (1, 1)
    del side
    take_a_step()
    assert other.waits == 2


@contextmanager
def host_not_blocked() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_average_is_right_after_wait() -> None:
    side = SideStream(torch.device("cuda"))
    model, average = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    # A kernel's first launch loads it, which may wait for the device.
    copied = average.lerp(model, 0.0).clone().fill_(0.0)

    def work() -> None:
        torch.cuda._sleep(LONG)
        average.lerp_(model, 0.5)

    with host_not_blocked():
        torch.cuda._sleep(LONG)
        model.fill_(3.0)  # the work comes after what the current stream was given
        side.run(work)
        running = not torch.cuda.current_stream().query() or not side._last[0].query()
        side.wait()
        copied.copy_(average)
    assert running
    assert copied.unique().tolist() == [1.5]


@pytest.mark.gpu
def test_the_next_step_comes_after_the_update() -> None:
    side = SideStream(torch.device("cuda"))
    weight = torch.nn.Parameter(torch.ones(1 << 20, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.step()
    average = torch.full_like(weight.detach(), 5.0)

    def work() -> None:
        torch.cuda._sleep(LONG)
        average.copy_(weight.detach())

    with host_not_blocked():
        side.run(work)
        optimizer.step()
    torch.cuda.synchronize()
    assert average.unique().tolist() == [0.0]
    assert weight.unique().tolist() == [-1.0]


@pytest.mark.gpu
def test_the_current_stream_goes_on_beside_the_work() -> None:
    side = SideStream(torch.device("cuda"))
    tensor = torch.ones(8, device="cuda").add_(1)  # a kernel's first launch may wait for the device
    torch.cuda.synchronize()
    side.run(lambda: torch.cuda._sleep(10 * LONG))
    tensor.add_(1)
    torch.cuda.current_stream().synchronize()
    assert not side._last[0].query()


@pytest.mark.gpu
def test_memory_of_a_dropped_average_is_not_used_too_early() -> None:
    torch.cuda.empty_cache()
    side = SideStream(torch.device("cuda"))
    average = torch.zeros(1 << 20, device="cuda")
    address = average.data_ptr()

    def work(target: Tensor = average) -> None:
        torch.cuda._sleep(LONG)
        target.fill_(7.0)

    side.run(work)
    del side, work, average
    other = torch.zeros(1 << 20, device="cuda")
    assert other.data_ptr() == address
    torch.cuda.synchronize()
    assert not other.any()


@pytest.mark.gpu
def test_tensors_that_are_only_read_by_the_work_may_be_let_go() -> None:
    side = SideStream(torch.device("cuda"))
    average, flag = torch.zeros(1 << 20, device="cuda"), torch.ones(1 << 20, device="cuda")

    def work(source: Tensor = flag) -> None:
        torch.cuda._sleep(LONG)
        average.copy_(source)

    side.run(work, [flag])
    del work, flag
    torch.full((1 << 20,), 9.0, device="cuda")
    side.wait()
    assert average.unique().tolist() == [1.0]


@pytest.mark.gpu
def test_in_a_capture_the_work_is_part_of_the_graph() -> None:
    side = SideStream(torch.device("cuda"))
    average = torch.zeros(4, device="cuda")
    side.run(lambda: average.add_(1))
    side.wait()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait()
        side.run(lambda: average.add_(1))
    graph.replay()
    graph.replay()
    assert average.tolist() == [3.0] * 4


@pytest.mark.gpu
def test_values_and_flags_from_a_gpu_are_those_of_the_call() -> None:
    sources, recorder = mixture("cuda"), Recorder()
    offload = Offload(sources, recorder.make)
    assert all(tensor.is_pinned() for staged in recorder.staged for tensor in staged if tensor.numel())
    flags = [torch.zeros((), device="cuda"), torch.ones((), device="cuda"), torch.ones(()), None]
    expected = []
    for flag in flags:
        expected.append([source.cpu() for source in sources])
        with host_not_blocked():
            torch.cuda._sleep(LONG)
            offload.update(flag)
            for source in sources:
                source.zero_()
        for source in sources:
            source.copy_(torch.randn(source.shape, device="cuda") * 5)
    offload.wait()
    assert recorder.flags == [False, True, True, None]
    for values, exact in zip(recorder.values, expected, strict=True):
        assert all(map(torch.equal, values, exact))


@pytest.mark.gpu
def test_a_packed_copy_is_not_written_while_it_is_transferred() -> None:
    source, recorder = torch.zeros(1 << 26, device="cuda"), Recorder()
    offload = Offload([source], recorder.make)
    for number in range(4):
        source.fill_(number)
        offload.update()
    offload.wait()
    assert [values[0].unique().tolist() for values in recorder.values] == [[0.0], [1.0], [2.0], [3.0]]


@pytest.mark.gpu
def test_one_transfer_for_each_dtype() -> None:
    sources = mixture("cuda")
    offload = Offload(sources, Recorder().make)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        offload.update()
        offload.wait()
        torch.cuda.synchronize()
    transfers = [event for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(transfers) == len({source.dtype for source in sources})


@pytest.mark.gpu
def test_an_update_in_a_capture_is_refused() -> None:
    offload = Offload([torch.ones(1, device="cuda")], Recorder().make)
    kept = torch.ones(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        kept.add_(1)
        with pytest.raises(RuntimeError, match="CUDA graph"):
            offload.update()


def test_one_launch_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, recorder = mixture(), Recorder()
    offload = Offload(sources, recorder.make)
    launched: list[int] = []
    original = torch._foreach_copy_

    def counted(targets: list[Tensor], origins: list[Tensor]) -> object:
        launched.append(len(targets))
        return original(targets, origins)

    monkeypatch.setattr(module.torch, "_foreach_copy_", counted)
    offload.update()
    offload.wait()
    assert len(launched) == len({source.dtype for source in sources})
    assert sum(launched) == len(sources)
