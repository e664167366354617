"""The arithmetic of a rank's share, and the command that checks it against counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import shards
from benchmarks.__main__ import main
from benchmarks.shard_arithmetic import LLAMA_70B, Share


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 101, 128])
def test_rows_are_those_of_torchs_chunks(rows: int, world: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(world)]
    held = [Share.of([(rows, 3)], rank, world, 1).elements for rank in range(world)]
    assert held == [3 * length for length in chunks + [0] * (world - len(chunks))]


def test_the_70b_model_has_the_published_number_of_weights() -> None:
    # The index of its safetensors files says 141107412992 bytes: meta-llama/Llama-3.1-70B on Hugging Face.
    total = sum(Share.of(LLAMA_70B.shapes(), rank, 64, 1).elements for rank in range(64))
    assert 2 * total == 141107412992


def test_counts_on_two_ranks_are_the_arithmetics(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "\n0 differences\n" in printed
    # 1.1 billion weights a GPU, of 4 bytes held, and 2 + 4 + 4 moved.
    assert "64 GPUs: 1102.4 million weights, 4.41 GB held, 11.02 GB moved, 1 launch, 0 collectives" in printed


def test_a_count_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = [Share.of(shards.SMALL.shapes(), 0, 1, averages) for averages in shards.AVERAGES]
    wrong = [*right[:-1], dataclasses.replace(right[-1], collectives=1)]
    monkeypatch.setattr(shards, "_count", lambda world: [wrong])
    assert main(["shards", "--ranks", "1"]) == 1
    assert "\n1 differences\n" in capsys.readouterr().out
