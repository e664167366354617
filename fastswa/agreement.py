"""Ranks that have to do the same, or all fail with an error: a small gather of objects, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from typing import Any

from torch import Tensor, distributed

from fastswa import shards

CheckRanks = bool | distributed.ProcessGroup | None


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others.

    Args:
        rank: which it is.
        digest: of what it is about to do.
        error: by which it failed, in words; None if it did not.
    """

    rank: int
    digest: str
    error: str | None


def ranks_to_ask(check_ranks: CheckRanks, tensors: Iterable[Tensor]) -> Sequence[distributed.ProcessGroup]:
    """The groups of ranks that have to agree.

    Args:
        check_ranks: a group; True for the ranks that share the tensors, or all where they share none; None for those
            that share them; False for none.
        tensors: what is averaged.

    Returns:
        Groups, to be asked one after another; none where nobody is to be asked.

    Raises:
        TypeError: something else.
        RuntimeError: True, where torch.distributed was not initialised.
    """
    if isinstance(check_ranks, distributed.ProcessGroup):
        return [check_ranks]
    if check_ranks not in (True, False, None):
        raise TypeError(f"check_ranks must be True, False, None or a ProcessGroup, got {check_ranks!r}")
    shared = shards.groups(tensors) if check_ranks is not False else []
    if shared or not check_ranks:
        return shared
    if not distributed.is_initialized():
        raise RuntimeError("check_ranks=True needs torch.distributed.init_process_group first")
    world = distributed.group.WORLD
    assert world is not None
    return [world]


@contextmanager
def agreeing(
    groups: Sequence[distributed.ProcessGroup], what: str, facts: Callable[[], Mapping[str, Any]]
) -> Iterator[None]:
    """Do something on all ranks, or raise on all: where one fails, or where they are about to do different things.

    All ranks of the groups must come here; one that fails inside tells the others all the same.

    Args:
        groups: of ranks to ask; with none, nobody is asked.
        what: is done, for errors.
        facts: says, at the end, what this rank is about to do; its values are compared as they print.

    Raises:
        ValueError: the ranks differ; names the first fact that does, in the same words on every rank.
        RuntimeError: another rank failed; repeats its error.
    """
    if not groups:
        yield
        return
    try:
        yield
        own = {key: str(value) for key, value in facts().items()}
    except Exception as error:
        _tell(groups, _Report(distributed.get_rank(), "", f"{type(error).__name__}: {error}"))
        raise
    digest = sha256(repr(own).encode()).hexdigest()
    reports = _tell(groups, _Report(distributed.get_rank(), digest, None))
    failed = next((report for report in reports if report.error is not None), None)
    if failed is not None:
        raise RuntimeError(f"{what} failed on rank {failed.rank}: {failed.error}")
    if len({report.digest for report in reports}) > 1:
        raise ValueError(f"{what}: the ranks disagree; {_difference(_tell(groups, (distributed.get_rank(), own)))}")


def _tell(groups: Sequence[distributed.ProcessGroup], told: Any) -> list[Any]:
    """What each rank tells, on every rank, by rank."""
    known = [told]
    for group in groups:
        everyone: list[Any] = [None] * group.size()
        distributed.all_gather_object(everyone, known, group)
        known = list(chain.from_iterable(everyone))
    return sorted(known, key=lambda each: each.rank if isinstance(each, _Report) else each[0])


def _difference(told: Sequence[tuple[int, Mapping[str, str]]]) -> str:
    first, own = told[0]
    for rank, others in told[1:]:
        for key in (*own, *others):
            here, there = own.get(key, "missing"), others.get(key, "missing")
            if here != there:
                return f"{key} is {here} on rank {first} and {there} on rank {rank}"
        if list(own) != list(others):
            return f"rank {first} and rank {rank} have the same tensors in another order"
    return "what they do changes from one look to the next"
