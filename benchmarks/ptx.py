"""Compiles every Triton kernel for four GPU targets, without a GPU, and checks what the machine code promises.

A promise: 128-bit loads and stores where both addresses are aligned, no spill, no local memory, no shared memory.
To add a kernel, write a function that yields its variants and list it in `KERNELS`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator

import triton

from benchmarks.machine_code import TARGETS, Access, Report, Variant, check, fresh_compiler


def lerp() -> Iterator[Variant]:
    """`lerp_kernel` for each pair of dtypes and each form of the weight, as `LaunchConfig` launches it."""
    from fastswa_kernels import LaunchConfig
    from fastswa_kernels.average_kernel import lerp_kernel, specialisation
    from fastswa_kernels.pairs import FLOAT_DTYPES

    config = LaunchConfig()
    aligned, copied = "_lerp_row(aligned_average", "_copy_row(tl.multiple_of("
    for average, source in itertools.product(FLOAT_DTYPES, FLOAT_DTYPES):
        constants = specialisation(average, source)
        vector = 16 // max(average.itemsize, source.itemsize)
        wide = max(average.itemsize, source.itemsize) == 8
        accesses = [
            Access("load", "tl.load(average", aligned, vector * average.itemsize, config.block * average.itemsize),
            Access("load", "tl.load(source", aligned, vector * source.itemsize, config.block * source.itemsize),
            Access("store", "tl.store(average", aligned, vector * average.itemsize, config.block * average.itemsize),
            Access("load", "tl.load(source", copied, 16, 4 * config.block),
            Access("store", "tl.store(target", copied, 16, 4 * config.block),
        ]
        # A float64 average never gets a float: Triton would pass it as float32.
        for weight in ("*fp64",) if wide else ("fp32", "*fp32", "*fp64"):
            yield Variant(
                lerp_kernel,
                f"{str(average)[6:]} <- {str(source)[6:]}, weight {weight}",
                {"table": "*i64", "lerp_rows": "i32", "rows": "i32", "weight": weight},
                {**constants, "WEIGHT_IS_TENSOR": weight.startswith("*"), "BLOCK": config.block},
                config.num_warps,
                accesses,
                aligned=("table",),
            )


KERNELS: tuple[Callable[[], Iterator[Variant]], ...] = (lerp,)


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
            print(f"{'variant':36} {'target':7} {'bytes':24} registers stack spills shared")
        reports.append(report)
        widths = " ".join("/".join(map(str, sorted(set(seen)))) or "-" for seen in report.widths)
        print(
            f"{report.variant:36} {report.target:7} {widths:24} {report.registers:9} {report.stack:5} "
            f"{report.spills:6} {report.shared:6}",
            flush=True,
        )
    broken = [(report, words) for report in reports for words in report.broken]
    for report, words in broken:
        print(f"BROKEN {report.kernel}, {report.variant}, {report.target}: {words}")
    print(f"\n{len(reports)} compilations in {time.perf_counter() - start:.0f} s, {len(broken)} broken promises")
    return int(bool(broken) or not reports)
