"""What one rank's share of an update is, when FSDP2 cuts every tensor along its rows: bytes, launches, collectives."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MOST_AVERAGES = 8
"""Averages that one launch moves; more take another, which reads the weights again."""


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder-only transformer with grouped queries, a gated network and an untied head.

    Args:
        layers: how many.
        width: of the embedding.
        keys: width of all keys together.
        hidden: width of the network in a layer.
        vocabulary: how many tokens.
    """

    layers: int
    width: int
    keys: int
    hidden: int
    vocabulary: int

    def layer(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one layer's tensors."""
        return {
            "query": (self.width, self.width),
            "key": (self.keys, self.width),
            "value": (self.keys, self.width),
            "output": (self.width, self.width),
            "gate": (self.hidden, self.width),
            "up": (self.hidden, self.width),
            "down": (self.width, self.hidden),
            "attention_norm": (self.width,),
            "network_norm": (self.width,),
        }

    def rest(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the other tensors."""
        return {
            "embedding": (self.vocabulary, self.width),
            "norm": (self.width,),
            "head": (self.vocabulary, self.width),
        }

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all tensors."""
        return [*self.rest().values(), *(shape for _ in range(self.layers) for shape in self.layer().values())]


LLAMA_70B = Decoder(layers=80, width=8192, keys=1024, hidden=28672, vocabulary=128256)
"""Llama 3.1 70B (Dubey et al. 2024, table 3)."""


@dataclass(frozen=True)
class Share:
    """What one rank has to do with an update.

    Args:
        elements: of the weights, that the rank holds.
        held: bytes of all averages.
        moved: bytes read and written by an update.
        launches: of the kernel.
        collectives: that the update takes part in.
    """

    elements: int
    held: int
    moved: int
    launches: int
    collectives: int = 0

    @classmethod
    def of(
        cls, shapes: Iterable[tuple[int, ...]], rank: int, world: int, averages: int, average: int = 4, weight: int = 2
    ) -> Share:
        """A rank's share by arithmetic.

        Args:
            shapes: of the weights, all of one dtype.
            rank: whose share.
            world: ranks over which each tensor's rows are cut.
            averages: of each weight.
            average: bytes of an average's element.
            weight: bytes of a weight's element.
        """
        elements = sum(_rows(shape[0], rank, world) * math.prod(shape[1:]) for shape in shapes)
        launches = math.ceil(averages / MOST_AVERAGES) if elements else 0
        # Each launch reads the weights; each average is read and written once.
        moved = elements * (launches * weight + 2 * averages * average)
        return cls(elements, elements * averages * average, moved, launches)


def _rows(rows: int, rank: int, world: int) -> int:
    """The rows that a rank holds: all but the last ranks hold the same number, and some may hold none."""
    most = math.ceil(rows / world)
    return max(0, min(most, rows - rank * most))
