"""How far a library's average and ours of the same models may be apart, when both round."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.numerics import assert_close_in_ulps, lerp_ulps


class Apart:
    """The bound, step by step: what a step errs by, the next one shrinks.

    Args:
        tensors: the model's, at the start.
        arithmetic: the dtype of the arithmetic.
        weight_error: of the weight, where a library computes it in less than float64.
    """

    def __init__(self, tensors: Iterable[Tensor], arithmetic: torch.dtype, weight_error: float = 0.0) -> None:
        self.largest = [tensor.detach().abs().double() for tensor in tensors]
        self.ulps = 0.0
        # Both sides round: as much as one lerp each, half an ulp for the weight in this dtype each; a wrong weight acts
        # on a distance of two operands.
        self._own = 2 * lerp_ulps(arithmetic) + 1 + 4 * weight_error / torch.finfo(arithmetic).eps

    def step(self, tensors: Iterable[Tensor], weight: float) -> None:
        """Take the model's values into the bound, which both averages took by this weight."""
        for tensor, size in zip(tensors, self.largest, strict=True):
            torch.maximum(size, tensor.detach().abs().double(), out=size)
        self.ulps = (1 - weight) * self.ulps + self._own

    def check(self, ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
        """Compare the averages."""
        for one, other, size in zip(ours, theirs, self.largest, strict=True):
            assert one.dtype == other.dtype
            assert_close_in_ulps(one.detach(), other.detach().double(), self.ulps, size)


@torch.no_grad()
def walk(tensors: Iterable[Tensor]) -> None:
    """A random step of training; integers count on."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor += 0.3 * torch.randn_like(tensor)
        else:
            tensor += 1


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))
