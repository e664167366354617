"""Averages on the CPU in a thread: staged copies, a bounded queue, errors, and nothing lost at exit."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastswa import offload as module
from fastswa.offload import SLOTS, Average, Offload
from tests.host import LONG, host_not_blocked

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
