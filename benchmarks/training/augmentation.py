"""Batches of a pass: put in order, shifted, mirrored and normalised on the device, as a function of the seed and epoch.

All that is random in an epoch is drawn on the CPU before its first batch, so that it is the same on every device:
the order, each image's shift, and whether it is mirrored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.training.datasets import Dataset

PURPOSES = ("training", "statistics", "dropout")
"""What draws random numbers in an epoch; each has its own, so that none depends on whether another runs."""


def seed_of(seed: int, epoch: int, purpose: str) -> int:
    """The seed of a generator, from the run's seed and the epoch, mixed as numpy mixes them.

    Args:
        seed: of the run; 0 or more.
        epoch: 0 or more.
        purpose: one of `PURPOSES`.

    Returns:
        64 bits.

    References:
        numpy.random.SeedSequence (O'Neill's seed_seq): neighbouring inputs give unrelated seeds.
    """
    entropy = (seed, epoch, PURPOSES.index(purpose))
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Batches:
    """A pass, the same each time it is iterated; the last batch may be smaller than the others.

    Args:
        dataset: says how images are normalised and augmented.
        images: uint8, (N, C, H, W).
        labels: int64, (N,), on the images' device.
        batch_size: images of a batch.
        memory_format: of the batches.
        seed: of order, shifts and mirroring; None for the images as they are, in their own order.
    """

    dataset: Dataset
    images: Tensor
    labels: Tensor
    batch_size: int
    memory_format: torch.memory_format = torch.contiguous_format
    seed: int | None = None

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, (n, C, H, W) of the dataset's dtype, and labels."""
        device = self.images.device
        mean, std = (
            torch.tensor(values, dtype=self.dataset.dtype, device=device).view(-1, 1, 1)
            for values in (self.dataset.mean, self.dataset.std)
        )
        for images, labels in self._augmented() if self.seed is not None else self._plain():
            images = images.to(self.dataset.dtype, memory_format=self.memory_format)
            yield images.sub_(mean).div_(std), labels

    def _plain(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)

    def _augmented(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device, padding = len(self.images), self.images.device, self.dataset.padding
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(count, generator=generator)
        shifts = torch.randint(2 * padding + 1, (2, count), generator=generator)
        mirrored = torch.randint(2, (count,), generator=generator)
        # One copy an epoch: a copy for each batch would make the host wait for the device.
        drawn = torch.stack([order, *shifts, mirrored]).to(device)
        for index, down, right, mirror in (part.unbind() for part in drawn.split(self.batch_size, 1)):
            images = crop(self.images[index], padding, down, right)
            if self.dataset.flip:
                images = torch.where(mirror.bool().view(-1, 1, 1, 1), images.flip(3), images)
            yield images, self.labels[index]


def crop(images: Tensor, padding: int, down: Tensor, right: Tensor) -> Tensor:
    """Cut a window of an image's own size out of each image, after zeros were put around it.

    Args:
        images: (n, C, H, W).
        padding: zeros on each side.
        down: of each window's upper edge from the padding's; (n,), from 0 to 2 `padding`.
        right: of each window's left edge from the padding's.

    Returns:
        Images of the same shape.

    Example:
        >>> crop(torch.ones(1, 1, 2, 2), 1, torch.tensor([0]), torch.tensor([1]))
        tensor([[[[0., 0.],
                  [1., 1.]]]])
    """
    height, width = images.shape[2:]
    windows = pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, down, right]


def training_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epoch: int,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Batches:
    """The training set, in an order of its own in each epoch, every image shifted and perhaps mirrored.

    Args:
        dataset: on the device of the network.
        batch_size: images of a batch.
        seed: of the run.
        epoch: of the run.
        memory_format: of the batches.
    """
    drawn = seed_of(seed, epoch, "training")
    return Batches(dataset, dataset.training_images, dataset.training_labels, batch_size, memory_format, drawn)


def statistics_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epoch: int,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Batches:
    """The training set for `fastswa.update_bn`: augmented as in training, with random numbers of its own.

    Args:
        dataset, batch_size, seed, epoch, memory_format: as in `training_batches`.
    """
    drawn = seed_of(seed, epoch, "statistics")
    return Batches(dataset, dataset.training_images, dataset.training_labels, batch_size, memory_format, drawn)


def test_batches(
    dataset: Dataset,
    batch_size: int,
    memory_format: torch.memory_format = torch.contiguous_format,  # noqa: PT028 - no test of pytest's
) -> Batches:
    """The test set as it is, in its own order.

    Args:
        dataset, batch_size, memory_format: as in `training_batches`.
    """
    return Batches(dataset, dataset.test_images, dataset.test_labels, batch_size, memory_format)
