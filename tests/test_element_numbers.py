"""Parts of tensors, each by itself, are rounded by the random bits that their elements have in the whole."""

from __future__ import annotations

import pytest
import torch

from fastswa import backends
from fastswa.flat import FlatBuffers

# Gathered with neighbours, alone, and in several pieces of the cache.
SIZES = (5, 9, 3, 40_000, 7)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_parts_are_rounded_as_the_whole(backend: str) -> None:
    sources = [torch.rand(size) for size in SIZES]
    starts = [sum(SIZES[:index]) for index in range(len(SIZES))]

    def updated(parts: list[torch.Tensor], numbers: list[int]) -> list[torch.Tensor]:
        averages = [torch.zeros_like(part, dtype=torch.bfloat16) for part in parts]
        flat, none = FlatBuffers(averages), FlatBuffers([])
        backends.prepare_sets([averages], parts, [], [], backend, [flat], none, numbers).lerp_([0.3], (1, 2), None)
        return averages

    whole = updated(sources, starts)
    rows = [size // 2 for size in SIZES]
    first = updated([source[:row] for source, row in zip(sources, rows, strict=True)], starts)
    second = [start + row for start, row in zip(starts, rows, strict=True)]
    last = updated([source[row:] for source, row in zip(sources, rows, strict=True)], second)
    assert all(torch.equal(torch.cat(parts), each) for *parts, each in zip(first, last, whole, strict=True))
    # Other numbers, other bits.
    assert not torch.equal(updated(sources, [start + 1 for start in starts])[3], whole[3])
