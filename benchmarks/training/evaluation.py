"""How good a model is on a set of images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss


class Score(NamedTuple):
    """Mean cross entropy, and the share of images that were told right, in %."""

    loss: float
    accuracy: float


class Tally:
    """Adds batches up on the device; the host waits for it once, at the end.

    Args:
        device: of the batches.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.images = 0
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Take a batch.

        Args:
            loss: its mean loss.
            scores: (n, classes).
            labels: (n,).
        """
        right = (scores.detach().argmax(1) == labels).sum()
        self.images += len(labels)
        self.sums += torch.stack([loss.detach().double() * len(labels), right.double()])

    def score(self) -> Score:
        """Of all batches so far."""
        loss, right = (self.sums / self.images).tolist()
        return Score(loss, 100 * right)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str) -> Score:
    """Test a model, which is then in evaluation mode.

    Args:
        model: on the device.
        batches: of images and labels, on the device.
        device: of both.
    """
    tally = Tally(device)
    model.eval()
    for images, labels in batches:
        scores = model(images)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        tally.add(cross_entropy(scores, labels), scores, labels)
    return tally.score()


def score_of(probabilities: Tensor, labels: Tensor) -> Score:
    """Of predictions that are probabilities already.

    Args:
        probabilities: (N, classes).
        labels: (N,).
    """
    right = (probabilities.argmax(1) == labels).double().mean()
    return Score(nll_loss(probabilities.log(), labels).item(), 100 * right.item())
