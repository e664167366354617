"""An update past one GPU: the arithmetic of a rank's share, checked against what real ranks count on a small model."""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from benchmarks.shard_arithmetic import LLAMA_70B, Decoder, Share
from benchmarks.shards_process import count

SMALL = Decoder(layers=2, width=20, keys=5, hidden=53, vocabulary=101)
"""Sizes that 2, 4 and 8 do not divide; of the keys some of eight ranks hold nothing."""

AVERAGES = (1, 2, 9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options.

    Args:
        parser: the command's own.
    """
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="numbers of gloo processes to count on")


def run(arguments: argparse.Namespace) -> int:
    """Print target and count of every rank, then the arithmetic for 70B weights.

    Args:
        arguments: the parsed command line.

    Returns:
        0 if every count is what the arithmetic says.
    """
    wrong = 0
    print(
        f"{'ranks':>5} {'rank':>4} {'averages':>8}  {'':7} {'held, B':>9} {'moved, B':>9} {'launches':>8} collectives"
    )
    for world in arguments.ranks:
        for rank, shares in enumerate(_count(world)):
            for averages, counted in zip(AVERAGES, shares, strict=True):
                target = Share.of(SMALL.shapes(), rank, world, averages)
                wrong += counted != target
                for name, share in (("target", target), ("counted", counted)):
                    print(f"{world:5} {rank:4} {averages:8}  {name:7} {_columns(share)}")
    print(f"{wrong} differences")
    print("\n70B bfloat16 weights, one float32 average, the rank that holds most:")
    for world in (64, 1024):
        share = max((Share.of(LLAMA_70B.shapes(), rank, world, 1) for rank in range(world)), key=lambda each: each.held)
        print(
            f"{world} GPUs: {share.elements / 1e6:.1f} million weights, {share.held / 1e9:.2f} GB held, "
            f"{share.moved / 1e9:.2f} GB moved, {share.launches} launch, {share.collectives} collectives"
        )
    return int(wrong > 0)


def _count(world: int) -> list[list[Share]]:
    with (
        tempfile.TemporaryDirectory() as directory,
        ProcessPoolExecutor(max_workers=world, mp_context=get_context("spawn")) as executor,
    ):
        return list(executor.map(partial(count, SMALL, AVERAGES, directory, world), range(world)))


def _columns(share: Share) -> str:
    return f"{share.held:9} {share.moved:9} {share.launches:8} {share.collectives:11}"
