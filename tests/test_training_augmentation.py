"""Batches of a pass are shifted, mirrored and normalised as one image at a time would be, by seed and epoch alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.training import augmentation
from benchmarks.training.augmentation import crop, seed_of, statistics_batches, training_batches
from benchmarks.training.datasets import Dataset
from tests.numerics import assert_close_in_ulps


def random_dataset(count: int, size: int, padding: int, flip: bool) -> Dataset:
    """Images whose windows can be told apart: all bytes differ from 0 and from most others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count)
    return Dataset("cifar10", images, labels, images, labels, count, (0.0,) * 3, (1.0,) * 3, padding, flip)


def windows(image: Tensor, padding: int) -> dict[tuple[int, int, bool], Tensor]:
    """Every image that augmentation may make of one, pixel by pixel."""
    height, width = image.shape[1:]
    found = {}
    for down in range(2 * padding + 1):
        for right in range(2 * padding + 1):
            shifted = torch.zeros_like(image)
            for row in range(height):
                for column in range(width):
                    from_row, from_column = row + down - padding, column + right - padding
                    if 0 <= from_row < height and 0 <= from_column < width:
                        shifted[:, row, column] = image[:, from_row, from_column]
            found[down, right, False] = shifted
            mirrored = torch.empty_like(shifted)
            for column in range(width):
                mirrored[:, :, column] = shifted[:, :, width - 1 - column]
            found[down, right, True] = mirrored
    return found


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (1, False), (2, True), (4, True)])
def test_augmentation_against_one_image_at_a_time(padding: int, flip: bool) -> None:
    dataset = random_dataset(count=23, size=5, padding=padding, flip=flip)
    possible = [windows(image, padding) for image in dataset.training_images]
    seen: Counter[tuple[int, int, bool]] = Counter()
    epochs = 60
    for epoch in range(epochs):
        order: list[int] = []
        for images, labels in training_batches(dataset, 8, seed=0, epoch=epoch):
            for image, label in zip(images, labels.tolist(), strict=True):
                found = [key for key, window in possible[label].items() if torch.equal(image, window.float())]
                assert len(found) == 1
                seen[found[0]] += 1
                order.append(label)
        assert sorted(order) == list(range(23))
    places = (2 * padding + 1) ** 2 * (2 if flip else 1)
    assert len(seen) == places
    # Equally often: the sum of squared deviations has mean places - 1 and variance 2 (places - 1).
    expected = 23 * epochs / places
    deviation = sum((number - expected) ** 2 / expected for number in seen.values())
    assert deviation <= places - 1 + 5 * (2 * (places - 1)) ** 0.5


def test_crop_of_images_that_are_not_square() -> None:
    images = torch.arange(1, 2 * 3 * 4 * 6 + 1).view(2, 3, 4, 6)
    down, right = torch.tensor([0, 3]), torch.tensor([4, 1])
    cropped = crop(images, 2, down, right)
    for image, found, key in zip(images, cropped, zip(down.tolist(), right.tolist(), strict=True), strict=True):
        assert torch.equal(found, windows(image, 2)[*key, False])


def flat(batches: augmentation.Batches) -> tuple[Tensor, Tensor]:
    """All images and labels of a pass."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_pass_is_a_function_of_seed_and_epoch() -> None:
    dataset = random_dataset(count=40, size=4, padding=1, flip=True)
    images, labels = flat(training_batches(dataset, 16, seed=3, epoch=7))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    again = training_batches(dataset, 16, seed=3, epoch=7)
    iterator = iter(again)
    next(iterator)
    # Neither a pass that was left, nor another in between, nor the global generator matters.
    flat(statistics_batches(dataset, 16, seed=3, epoch=7))
    for _ in range(2):
        assert torch.equal(flat(again)[0], images)
        assert torch.equal(flat(again)[1], labels)
    assert torch.equal(torch.get_rng_state(), before)
    # What the next batches hold does not depend on where the others end.
    assert torch.equal(flat(training_batches(dataset, 7, seed=3, epoch=7))[0], images)
    others = [
        training_batches(dataset, 16, 3, 8),
        training_batches(dataset, 16, 4, 7),
        statistics_batches(dataset, 16, 3, 7),
    ]
    for other in others:
        assert not torch.equal(flat(other)[1], labels)


def test_seeds_differ_by_seed_epoch_and_purpose() -> None:
    purposes = ("training", "statistics", "dropout")
    seeds = {seed_of(seed, epoch, purpose) for seed in range(20) for epoch in range(20) for purpose in purposes}
    assert len(seeds) == 20 * 20 * 3
    # All 64 bits are in use.
    assert min(seeds) < 2**62 < 2**63 < max(seeds) < 2**64
    with pytest.raises(ValueError, match="not in"):
        seed_of(0, 0, "pleasure")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalisation_against_float64(memory_format: torch.memory_format) -> None:
    # As in the SWA paper's code: bytes to [0, 1], then these.
    values = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    in_bytes = (tuple(255 * number for number in numbers) for numbers in values)
    dataset = replace(random_dataset(8, 6, 1, True), **dict(zip(("mean", "std"), in_bytes, strict=True)))
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1) for numbers in values)
    batches = augmentation.test_batches(dataset, 3, memory_format)
    images, labels = flat(batches)
    assert [len(batch) for batch, _ in batches] == [3, 3, 2]
    assert len(batches) == 3
    assert torch.equal(labels, dataset.test_labels)
    scaled = dataset.test_images.double() / 255
    # The mean, the deviation, the difference and the quotient are each rounded once, by half a unit.
    assert_close_in_ulps(images, (scaled - mean) / std, 2, scaled / std, mean / std)
    for batch in (batches, training_batches(dataset, 3, 0, 0, memory_format)):
        for images, _ in batch:
            assert images.is_contiguous(memory_format=memory_format)
            assert images.dtype == torch.float32


def test_what_the_padding_adds_is_black_before_normalisation() -> None:
    dataset = replace(random_dataset(30, 4, 3, False), mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0))
    images, _ = flat(training_batches(dataset, 10, seed=0, epoch=0))
    plain, _ = flat(training_batches(replace(dataset, mean=(0.0,) * 3, std=(1.0,) * 3), 10, seed=0, epoch=0))
    assert (plain == 0).any()
    for channel, black in enumerate((-5.0, -5.0, -6.0)):
        assert (images[:, channel][plain[:, channel] == 0] == black).all()
