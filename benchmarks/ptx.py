"""Compiles every Triton kernel for four GPU targets, without a GPU, and checks what the machine code promises.

A promise: 128-bit loads and stores where the addresses allow, no spill, no local memory, no shared memory but what the
lanes of a program need to add up their sums.
To add a kernel, write a function that yields its variants and list it in `KERNELS`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator

import torch
import triton

from benchmarks.machine_code import TARGETS, Access, Report, Variant, check, fresh_compiler
from benchmarks.ptx_moments import moments, sample

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def lerp() -> Iterator[Variant]:
    """`lerp_kernel` for each pair of dtypes and each form of the weight, as `LerpTable` launches it."""
    from fastswa_kernels.pairs import FLOAT_DTYPES

    for average, source in itertools.product(FLOAT_DTYPES, FLOAT_DTYPES):
        # A float64 average never gets a float: Triton would pass it as float32. A pointer meets no dtype of a tensor.
        floats = ("fp32", "*fp32") if average == source else ("fp32",)
        for weight in ("*fp64",) if torch.float64 in (average, source) else floats:
            yield _lerp_variant(average, source, 1, f"weight {weight}", weight, IDLE_AT_ZERO=False)


def multi_lerp() -> Iterator[Variant]:
    """`lerp_kernel` as `MultiLerpTable` launches it: several averages of a source, stochastic rounding, the flag."""
    fp32, bf16, fp16, fp64 = _DTYPES.values()
    rounded, graph = {"key": "i32"}, {"key": "i32", "step": "*i64", "skip": "*fp32"}
    for average, source, count, weight, more in (
        *((fp32, fp32, count, "fp32", {}) for count in (1, 2, 4, 8)),
        (fp32, bf16, 8, "fp32", {}),
        *((bf16, bf16, count, "fp32", rounded) for count in (1, 2, 4, 8)),
        *((fp16, fp16, count, "fp32", rounded) for count in (1, 8)),
        *((fp64, fp64, count, "*fp64", {}) for count in (2, 8)),
        # As a CUDA graph wants it: nothing comes from the host.
        (bf16, fp32, 2, "*fp32", graph),
        (fp32, fp32, 3, "*fp64", {"skip": "*i1"}),
    ):
        yield _lerp_variant(average, source, count, " ".join((weight, *more)), weight, **more)


def _lerp_variant(
    average: torch.dtype,
    source: torch.dtype,
    count: int,
    name: str,
    weight: str,
    IDLE_AT_ZERO: bool = True,
    **more: str,
) -> Variant:
    from fastswa_kernels import LaunchConfig
    from fastswa_kernels.average_kernel import lerp_kernel
    from fastswa_kernels.average_launch import specialisation

    config = LaunchConfig.for_elements(0, count, torch.float64 in (average, source))
    aligned, copied = "_lerp_row(aligned_averages", "_copy_row(tl.multiple_of("
    vector = 16 // max(average.itemsize, source.itemsize)
    constants = {
        **specialisation(average, source),
        **{absent: None for absent in ("key", "step", "skip") if absent not in more},
        "WEIGHT_IS_TENSOR": weight.startswith("*"),
        "IDLE_AT_ZERO": IDLE_AT_ZERO,
        "FIRST": 0,
        "K": count,
        "BLOCK": config.block,
    }
    return Variant(
        lerp_kernel,
        f"{count} {str(average)[6:]} <- {str(source)[6:]}, {name}",
        {
            "table": "*i64",
            "lerp_rows": "i32",
            "rows": "i32",
            "weights": weight if weight.startswith("*") else (weight,) * count,
            **more,
        },
        constants,
        config.num_warps,
        [
            Access("load", "tl.load(average", aligned, vector * average.itemsize, config.block * average.itemsize),
            Access("load", "tl.load(source", aligned, vector * source.itemsize, config.block * source.itemsize),
            Access("store", "tl.store(average", aligned, vector * average.itemsize, config.block * average.itemsize),
            Access("load", "tl.load(source", copied, 16, 4 * config.block),
            Access("store", "tl.store(target", copied, 16, 4 * config.block),
        ],
        aligned=("table",),
    )


def combine() -> Iterator[Variant]:
    """`combine_kernel` for each pair of dtypes; the number of sources is known at run time only."""
    from fastswa_kernels import LaunchConfig
    from fastswa_kernels.combine import specialisation
    from fastswa_kernels.combine_kernel import combine_kernel
    from fastswa_kernels.pairs import FLOAT_DTYPES

    aligned = "TARGET, SOURCE, VECTOR"
    for target, source in itertools.product(FLOAT_DTYPES, FLOAT_DTYPES):
        constants = specialisation(target, source)
        vector, block = 16 // max(target.itemsize, source.itemsize), constants["BLOCK"]
        yield Variant(
            combine_kernel,
            f"{str(target)[6:]} <- {str(source)[6:]}",
            {"table": "*i64", "aligned_rows": "i32", "rows": "i32", "coefficients": "*fp64", "sources": "i32"},
            constants,
            LaunchConfig().num_warps,
            [
                Access("load", "tl.load(source", aligned, vector * source.itemsize, block * source.itemsize),
                Access("store", "tl.store(target", aligned, vector * target.itemsize, block * target.itemsize),
            ],
            aligned=("table",),
        )


def merge_batch_stats() -> Iterator[Variant]:
    """`merge_batch_stats_kernel` for each dtype of a batch's statistics."""
    from fastswa_kernels.batch_norm_kernel import MERGE_BLOCK, NUM_WARPS, merge_batch_stats_kernel

    tensors = dict.fromkeys(("moments", "weights", "counts"), "*fp64")
    tensors |= dict.fromkeys(("layer_of_channel", "nonfinite"), "*i32")
    for dtype in _DTYPES:
        statistics = dict.fromkeys(("batch_mean", "batch_var"), f"*{dtype}")
        yield Variant(
            merge_batch_stats_kernel,
            f"batch {dtype}",
            {**tensors, **statistics, "channels": "i32"},
            {"BLOCK": MERGE_BLOCK},
            NUM_WARPS,
            [],
            aligned=(*tensors, *statistics),
        )


def batch_stats() -> Iterator[Variant]:
    """The kernels that read the input of `batch_stats`, for each dtype and each width of access that they may have."""
    from fastswa_kernels import batch_norm_kernel as kernels

    planes = kernels.plane_stats_kernel, ("channels", "plane_groups", "program_groups"), "groups"
    rows = kernels.row_stats_kernel, ("columns", "program_rows"), "rows"
    for (kernel, sizes, length), (name, dtype) in itertools.product((planes, rows), _DTYPES.items()):
        partials = "fp64" if name == "fp64" else "fp32"
        tile, row_tile = kernels.tile_size(dtype), kernels.row_tile(dtype)
        columns = row_tile["COLUMNS"] if length == "rows" else 1
        # From the widest access to a single element; then the widest again, for more than 2^31 values of a channel.
        widest = 16 // dtype.itemsize
        for vector, integer in [(widest >> step, "i32") for step in range(widest.bit_length())] + [(widest, "i64")]:
            signature = {"x": f"*{name}", "partials": f"*{partials}", length: integer} | dict.fromkeys(sizes, "i32")
            yield Variant(
                kernel,
                f"{name} by {vector}, {integer} values",
                signature,
                {"VECTOR": vector} | (row_tile if length == "rows" else {"BLOCK": tile // vector}),
                kernels.NUM_WARPS,
                [Access("load", "tl.load(x + ", "", vector * dtype.itemsize, tile * dtype.itemsize)],
                aligned=("x", "partials"),
                # Each warp's sum for each channel.
                shared=kernels.NUM_WARPS * columns * _DTYPES[partials].itemsize,
            )


def merge_partials() -> Iterator[Variant]:
    """`merge_partials_kernel`, the second launch of `batch_stats`, for both dtypes of partial sums."""
    from fastswa_kernels.batch_norm_kernel import PARTIALS, PARTIALS_NUM_WARPS, merge_partials_kernel

    for dtype, count in itertools.product(("fp32", "fp64"), ("i32", "i64")):
        yield Variant(
            merge_partials_kernel,
            f"{dtype}, {count} values",
            {"partials": f"*{dtype}", "mean": "*fp64", "m2": "*fp64", "rows": "i32", "channels": "i32", "count": count},
            dict(PARTIALS),
            PARTIALS_NUM_WARPS,
            [],
            aligned=("partials", "mean", "m2"),
            shared=PARTIALS_NUM_WARPS * PARTIALS["CHANNELS"] * 8,
        )


KERNELS: tuple[Callable[[], Iterator[Variant]], ...] = (
    lerp,
    multi_lerp,
    combine,
    moments,
    sample,
    merge_batch_stats,
    batch_stats,
    merge_partials,
)


def compile_all() -> Iterator[Report]:
    """Compile and check every variant of every kernel for every target.

    Yields:
        A report for each.
    """
    with fresh_compiler():
        for variants in KERNELS:
            for variant in variants():
                for target in TARGETS:
                    yield check(variant, target)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options.

    Args:
        parser: of the command.
    """


def run(arguments: argparse.Namespace) -> int:
    """Compile, print a table, name what is broken.

    Args:
        arguments: none are used.

    Returns:
        0 if every promise holds, 1 if not, 2 if nothing can be compiled here.
    """
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: kernels are interpreted in this process and can't be compiled", file=sys.stderr)
        return 2
    start = time.perf_counter()
    reports: list[Report] = []
    for report in compile_all():
        if not reports or report.kernel != reports[-1].kernel:
            print(f"\n{report.kernel}: bytes of an access in each of {', '.join(report.promises)}")
            print(f"{'variant':42} {'target':7} {'bytes':24} registers stack spills shared")
        reports.append(report)
        widths = " ".join("/".join(map(str, sorted(set(seen)))) or "-" for seen in report.widths)
        print(
            f"{report.variant:42} {report.target:7} {widths:24} {report.registers:9} {report.stack:5} "
            f"{report.spills:6} {report.shared:6}",
            flush=True,
        )
    broken = [(report, words) for report in reports for words in report.broken]
    for report, words in broken:
        print(f"BROKEN {report.kernel}, {report.variant}, {report.target}: {words}")
    print(f"\n{len(reports)} compilations in {time.perf_counter() - start:.0f} s, {len(broken)} broken promises")
    return int(bool(broken) or not reports)
