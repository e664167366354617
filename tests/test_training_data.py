"""The images of `python -m benchmarks train` are read from where they are, or refused in words."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.demo import Digits
from benchmarks.training.cifar import Archive
from benchmarks.training.datasets import NAMES, load

# What the authors' page says of the two archives.
LAYOUTS = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
        ("test_batch",),
        b"labels",
        10,
    ),
    "cifar100": Archive("cifar-100-python.tar.gz", "cifar-100-python", ("train",), ("test",), b"fine_labels", 100),
}

Written = Callable[[np.ndarray, Sequence[int], str], bytes]


def by_python3(images: np.ndarray, labels: Sequence[int], key: str) -> bytes:
    """A file's bytes as today's Python writes them."""
    return pickle.dumps({b"data": images, key.encode(): list(labels), b"coarse_labels": [0] * len(labels)})


def by_python2(images: np.ndarray, labels: Sequence[int], key: str) -> bytes:
    """A file's bytes as the authors' Python 2 wrote them: strings are bytes, the array comes from numpy.core."""

    def string(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + number(len(value))[1:] + value

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR"
    dtype += b"(K\x03" + string(b"|") + b"NNN" + number(-1) * 2 + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + string(b"b") + b"tR"
    shape = b"(" + b"".join(map(number, images.shape)) + b"t"
    array += b"(K\x01" + shape + dtype + b"I00\n" + string(images.tobytes()) + b"tb"
    numbers = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(key.encode()) + numbers + b"u."


def cifar(folder: Path, name: str, written: Written = by_python3) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Write a folder like the archive's, with a few random images in each file."""
    archive, generator = LAYOUTS[name], np.random.default_rng(0)
    inside = folder / archive.folder
    inside.mkdir()
    content = {}
    for count, file in enumerate((*archive.training, *archive.test), start=3):
        images = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = generator.integers(0, archive.classes, count).tolist()
        labels[-1] = archive.classes - 1
        (inside / file).write_bytes(written(images, labels, archive.labels.decode()))
        content[file] = images, labels
    return content


def test_digits_are_split_by_the_seed() -> None:
    zero, one = load("digits"), load("digits", seed=1)
    demo = Digits()
    # The demo's split is that of seed 0, and its images are normalised.
    for images, expected in ((zero.training_images, demo.training_images), (zero.test_images, demo.test_images)):
        assert torch.equal((images.float() - zero.mean[0]) / zero.std[0], expected)
    assert torch.equal(zero.training_labels, demo.training_labels)
    assert torch.equal(zero.test_labels, demo.test_labels)
    assert not torch.equal(zero.training_images, one.training_images)
    for dataset in (zero, one):
        assert (len(dataset.training_images), len(dataset.test_images)) == (160, 1637)
        assert set(Counter(dataset.training_labels.tolist()).values()) <= {15, 16, 17}
    everything = [torch.cat([set.training_images, set.test_images]).flatten(1).tolist() for set in (zero, one)]
    assert sorted(everything[0]) == sorted(everything[1])
    assert torch.equal(load("digits", seed=1).test_images, one.test_images)


def test_digits_for_the_cifar_networks() -> None:
    digits = load("digits")
    large = digits.enlarged()
    for small, images in ((digits.training_images, large.training_images), (digits.test_images, large.test_images)):
        assert images.shape == (len(small), 3, 32, 32)
        assert images.dtype == torch.uint8
        repeated = np.kron(small.numpy(), np.ones((1, 3, 4, 4), dtype=np.uint8))
        assert np.array_equal(images.numpy(), repeated)
    assert (large.mean, large.std, large.padding, large.channels) == ((0.0,) * 3, (16.0,) * 3, 4, 3)
    assert torch.equal(large.enlarged().training_images, large.training_images)
    odd = replace(digits, training_images=digits.training_images[..., :6, :6])
    with pytest.raises(ValueError, match="images of 1x6x6"):
        odd.enlarged()


@pytest.mark.parametrize("written", [by_python2, by_python3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_cifar_is_read_from_its_folder_or_the_one_above(tmp_path: Path, name: str, written: Written) -> None:
    content, archive = cifar(tmp_path, name, written), LAYOUTS[name]
    for path in (tmp_path, tmp_path / archive.folder, str(tmp_path)):
        dataset = load(name, path, seed=5)
        for files, images, labels in (
            (archive.training, dataset.training_images, dataset.training_labels),
            (archive.test, dataset.test_images, dataset.test_labels),
        ):
            assert labels.tolist() == [label for file in files for label in content[file][1]]
            assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
            rows = np.concatenate([content[file][0] for file in files])
            # A row is all of red, then green, then blue; each from the top line down.
            assert images[1, 2, 3, 4] == rows[1, 2 * 1024 + 3 * 32 + 4]
            assert np.array_equal(images.flatten(1).numpy(), rows)
        assert (dataset.classes, dataset.padding, dataset.flip) == (archive.classes, 4, True)
        # Those of the SWA paper's code, for bytes.
        assert dataset.mean == pytest.approx([125.307, 122.961, 113.8575])
        assert dataset.std == pytest.approx([51.5865, 50.847, 51.255])


def test_missing_files_are_explained(tmp_path: Path) -> None:
    for path, error in ((None, ValueError), (tmp_path, FileNotFoundError), (tmp_path / "nowhere", FileNotFoundError)):
        with pytest.raises(error) as refused:
            load("cifar10", path)
        for words in (
            "cifar-10-python.tar.gz",
            "cs.toronto.edu/~kriz/cifar.html",
            "cifar-10-batches-py",
            "data_batch_5",
        ):
            assert words in str(refused.value)
    cifar(tmp_path, "cifar100")
    missing = tmp_path / "cifar-100-python" / "test"
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {missing}.*cifar-100-python.tar.gz"):
        load("cifar100", tmp_path)
    with pytest.raises(ValueError, match=f"no dataset 'mnist'; known are {', '.join(NAMES)}"):
        load("mnist")


@pytest.mark.parametrize("written", [by_python2, by_python3])
def test_truncated_files_name_themselves(tmp_path: Path, written: Written) -> None:
    cifar(tmp_path, "cifar10", written)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_4"
    whole = path.read_bytes()
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{path} is cut short, damaged.*cifar-10-python.tar.gz"):
            load("cifar10", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]},
        {b"data": np.zeros((2, 1024), np.uint8), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1, 2]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "one"]},
        {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1]},
        {b"data": [0, 1], b"labels": [0, 1]},
        [b"data", b"labels"],
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object) -> None:
    cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"{path} is not one of cifar-10-batches-py's files"):
        load("cifar10", tmp_path)


class Call:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.called


def test_a_malicious_pickle_is_refused(tmp_path: Path) -> None:
    cifar(tmp_path, "cifar10")
    path, victim = tmp_path / "cifar-10-batches-py" / "data_batch_1", tmp_path / "victim"
    calls = {
        "mkdir": Call(os.mkdir, str(victim)),
        "exec": Call(exec, f"import os; os.mkdir({str(victim)!r})"),
        "getattr": Call(getattr, np.ndarray, "tofile"),
        "numpy.*fromfile": Call(np.fromfile, str(path)),
    }
    for name, call in calls.items():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps({"data": call}, protocol=protocol))
            with pytest.raises(ValueError, match=f"{path} .*it asks for .*{name}"):
                load("cifar10", tmp_path)
            assert not victim.exists()
    # It would have worked.
    pickle.loads(pickle.dumps(calls["mkdir"]))
    assert victim.exists()


def test_to_another_device() -> None:
    dataset = load("digits")
    moved = dataset.to("meta")
    assert {getattr(moved, name).device.type for name in vars(moved) if name.endswith(("images", "labels"))} == {"meta"}
    assert dataset.training_images.device.type == "cpu"
    assert (moved.name, moved.padding, moved.channels) == ("digits", 1, 1)
