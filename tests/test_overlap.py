"""Updates on a side stream: beside the current one, and before the next optimizer step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import optimizer as optimizers

from fastswa.overlap import SideStream
from tests.host import LONG, host_not_blocked


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
