"""Pairs written once, where preparing an update would not pay, or where the memory is not ours to move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastswa import backends
from fastswa.pairing import Pair


@torch.no_grad()
def copy_pairs(pairs: Sequence[Pair]) -> None:
    """Make each average equal to its source.

    Args:
        pairs: of any dtypes and devices.
    """
    if pairs:
        torch._foreach_copy_([pair.average for pair in pairs], [pair.source.detach() for pair in pairs])


@torch.no_grad()
def lerp_pairs(pairs: Sequence[Pair], weight: float) -> None:
    """Move each average towards its source, in the memory that both have.

    Args:
        pairs: of floating or complex dtypes, on any devices.
        weight: in [0, 1].
    """
    alike: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for pair in pairs:
        averages, sources = alike.setdefault((pair.average.dtype, pair.average.device), ([], []))
        averages.append(pair.average.detach())
        sources.append(pair.source.detach().to(pair.average.device))
    for averages, sources in alike.values():
        backends.lerp_lists_(averages, sources, weight)
    torch.autograd.graph.increment_version([pair.average for pair in pairs if not pair.average.is_inference()])
