"""CIFAR-10 and CIFAR-100 from the files of their authors, the "python version": pickles, read without trusting them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Archive:
    """What an archive of the authors unpacks to.

    Args:
        file: name of the archive.
        folder: that it holds.
        training, test: files in the folder, in order.
        labels: key of the labels.
        classes: to tell apart.
    """

    file: str
    folder: str
    training: tuple[str, ...]
    test: tuple[str, ...]
    labels: bytes
    classes: int


ARCHIVES = {
    "cifar10": Archive(
        file="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        training=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        labels=b"labels",
        classes=10,
    ),
    "cifar100": Archive(
        file="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        training=("train",),
        test=("test",),
        labels=b"fine_labels",
        classes=100,
    ),
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads numbers, strings, containers and numpy arrays, and nothing else: a pickle may name any function to call."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name.

        Args:
            module: where it is said to be.
            name: there.

        Raises:
            pickle.UnpicklingError: an array needs no such thing.
        """
        # numpy's own module for the first one has changed its name; the array itself knows where it is today.
        allowed = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if name not in allowed or module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array of images needs")
        return allowed[name]


def read_cifar(name: str, data_path: Path | str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read all images and labels.

    Args:
        name: a key of `ARCHIVES`.
        data_path: the archive's folder, or the folder that it lies in.

    Returns:
        Training images (uint8, (N, 3, 32, 32)) and labels (int64, (N,)), test images and labels.

    Raises:
        ValueError: `data_path` is missing, or a file is damaged or holds something else.
        FileNotFoundError: a file is not there.
    """
    archive = ARCHIVES[name]
    wanted = (
        f"{name} is read from {archive.folder}/, which holds {', '.join(archive.training + archive.test)}: get "
        f'{archive.file} (the "python version") from {PAGE}, unpack it, and pass that folder, or the one that it '
        f"lies in, as --data-path"
    )
    if data_path is None:
        raise ValueError(f"no data path was given; {wanted}")
    folder = Path(data_path)
    if (folder / archive.folder).is_dir():
        folder = folder / archive.folder
    for file in archive.training + archive.test:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"there is no {folder / file}; {wanted}")
    training, test = ([_read(folder / file, archive) for file in files] for files in (archive.training, archive.test))
    training_images, training_labels = map(np.concatenate, zip(*training, strict=True))
    test_images, test_labels = map(np.concatenate, zip(*test, strict=True))
    return training_images, training_labels, test_images, test_labels


def _read(path: Path, archive: Archive) -> tuple[np.ndarray, np.ndarray]:
    again = f"unpack {archive.file} again, or get it anew from {PAGE}"
    try:
        with path.open("rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
    # A damaged pickle is a damaged program: there is no error that it can't raise.
    except Exception as error:
        raise ValueError(f"{path} is cut short, damaged or not {archive.folder}'s: {error}; {again}") from error
    try:
        images, labels = content[b"data"], np.array(content[archive.labels], dtype=np.int64)
        count = len(labels)
        right = images.dtype == np.uint8 and images.shape == (count, 3 * 32 * 32) and labels.shape == (count,)
        right = right and ((labels >= 0) & (labels < archive.classes)).all()
    except (KeyError, TypeError, AttributeError, ValueError):
        right = False
    if not right:
        raise ValueError(
            f"{path} is not one of {archive.folder}'s files, which hold n images of 3072 bytes under 'data' and n "
            f"numbers below {archive.classes} under {archive.labels.decode()!r}; {again}"
        )
    return images.reshape(count, 3, 32, 32), labels
