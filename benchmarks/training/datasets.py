"""The images that the networks are trained on: scikit-learn's digits, and CIFAR from the standard files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.cifar import ARCHIVES, read_cifar

TRAINING_DIGITS = 160
"""About sixteen of each digit, so that there is something left to gain; the other 1637 images are the test set."""

NAMES = ("digits", *ARCHIVES)


@dataclass(frozen=True)
class Dataset:
    """Images of a training and of a test set with their labels; bytes, because they wait on the device.

    Args:
        name: one of `NAMES`.
        training_images: uint8, (N, C, H, W).
        training_labels: int64, (N,), from 0 to `classes` - 1.
        test_images, test_labels: likewise.
        classes: to tell apart.
        mean: of each channel, subtracted from an image; in the unit of the stored bytes.
        std: of each channel, by which the difference is divided.
        padding: zeros on each side of a training image, from which a window of its own size is cut.
        flip: whether half of the training images are mirrored.
        dtype: of the batches, float32 or float64.
    """

    name: str
    training_images: Tensor
    training_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    dtype: torch.dtype = torch.float32

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.training_images.shape[1]

    def to(self, device: torch.device | str) -> Dataset:
        """The same images and labels on a device.

        Args:
            device: to which they are copied, unless they are there.
        """
        names = ("training_images", "training_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def enlarged(self) -> Dataset:
        """Images of 32x32 pixels and three channels for the CIFAR networks: every pixel repeated, and every channel.

        Raises:
            ValueError: the images don't fit into that size a whole number of times, or have other channels.
        """
        channels, height, width = self.training_images.shape[1:]
        if height != width or 32 % height or channels not in (1, 3):
            raise ValueError(f"images of {channels}x{height}x{width} can't be made 3x32x32 by repeating")
        factor, copies = 32 // height, 3 // channels

        def enlarge(images: Tensor) -> Tensor:
            return images.repeat(1, copies, 1, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)

        return replace(
            self,
            training_images=enlarge(self.training_images),
            test_images=enlarge(self.test_images),
            mean=self.mean * copies,
            std=self.std * copies,
            padding=self.padding * factor,
        )


def load(name: str, data_path: Path | str | None = None, seed: int = 0) -> Dataset:
    """Read a dataset.

    Args:
        name: one of `NAMES`.
        data_path: folder of CIFAR's files, or the one that it lies in; digits come with scikit-learn.
        seed: of the digits' split into training and test set; CIFAR has a split of its own.

    Returns:
        The dataset, on the CPU.

    Raises:
        ValueError: there is no such dataset, `data_path` is missing, or a file is damaged.
        FileNotFoundError: a file is not there; the message says what to put where.
        ImportError: scikit-learn is not installed.

    Example:
        >>> load("digits", seed=3).training_images.shape
        torch.Size([160, 1, 8, 8])
    """
    if name == "digits":
        return _digits(seed)
    if name not in ARCHIVES:
        raise ValueError(f"there is no dataset {name!r}; known are {', '.join(NAMES)}")
    training_images, training_labels, test_images, test_labels = map(torch.from_numpy, read_cifar(name, data_path))
    return Dataset(
        name,
        *(training_images, training_labels, test_images, test_labels),
        classes=ARCHIVES[name].classes,
        # CIFAR-10's, which the SWA paper's code takes for CIFAR-100 too; for VGG16 it takes ImageNet's.
        mean=tuple(255 * value for value in (0.4914, 0.4822, 0.4465)),
        std=tuple(255 * value for value in (0.2023, 0.1994, 0.2010)),
        padding=4,
        flip=True,
    )


def _digits(seed: int) -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install fastswa[demo]") from error
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 1, 8, 8)
    parts = train_test_split(
        images, labels.astype(np.int64), train_size=TRAINING_DIGITS, stratify=labels, random_state=seed
    )
    training_images, test_images, training_labels, test_labels = map(torch.from_numpy, parts)
    return Dataset(
        "digits",
        *(training_images, training_labels, test_images, test_labels),
        classes=10,
        # From 0, the paper, to 16, full ink: scaled to [0, 1], and what the padding adds is paper.
        mean=(0.0,),
        std=(16.0,),
        padding=1,
        flip=False,
    )
