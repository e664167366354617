"""Variants of the kernels of running moments and of samples, for `python -m benchmarks ptx`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton.language as tl

from benchmarks.machine_code import Access, Variant

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PAIRS = list(itertools.product(_DTYPES, _DTYPES))


def moments() -> Iterator[Variant]:
    """`moments_kernel` for each pair of dtypes, without a slot of the ring, and with the weight in a tensor."""
    from fastswa_kernels import LaunchConfig
    from fastswa_kernels.moments_kernel import moments_kernel
    from fastswa_kernels.moments_table import compute_dtype, specialisation

    config, aligned = LaunchConfig(), "MOMENT, SOURCE, VECTOR"
    for moment, source, slot, form in (
        *((*pair, "a slot, ", "fp32") for pair in _PAIRS),
        (*_PAIRS[0], "", "fp32"),
        (*_PAIRS[0], "a slot, ", "*fp32"),
    ):
        wide = compute_dtype(moment, source) == torch.float64
        weight = "*fp64" if wide else form
        constants = specialisation(moment, source, "SOURCE", config)
        numbers = ("aligned_rows", "rows", "columns", *(["slot"] if slot else []))
        yield Variant(
            moments_kernel,
            f"{_name(moment)} <- {_name(source)}, {slot}weight {weight}",
            {"table": "*i64", **dict.fromkeys(numbers, "i32"), "weight": weight},
            {
                **({} if slot else {"slot": None}),
                **constants,
                "WEIGHT_IS_TENSOR": weight.startswith("*"),
                "COMPUTE": tl.float64 if wide else tl.float32,
            },
            config.num_warps,
            [
                _wide_access("load", "tl.load(sources", aligned, source, constants),
                _wide_access("load", "tl.load(means", aligned, moment, constants),
                _wide_access("load", "tl.load(variances", aligned, moment, constants),
                _wide_access("store", "tl.store(pointer", aligned, moment, constants),
            ],
            aligned=("table",),
        )


def sample() -> Iterator[Variant]:
    """`sample_kernel` for each pair of dtypes, and without a diagonal; K is known at run time only."""
    from fastswa_kernels import LaunchConfig
    from fastswa_kernels.moments_table import compute_dtype, specialisation
    from fastswa_kernels.sample_kernel import sample_kernel

    config, aligned = LaunchConfig(), "TARGET, MOMENT, VECTOR"
    for moment, target, diagonal in (*((*pair, True) for pair in _PAIRS), (*_PAIRS[0], False)):
        constants = specialisation(moment, target, "TARGET", config)
        read = ("means", "deviations", *(["variances"] if diagonal else []))
        yield Variant(
            sample_kernel,
            f"{_name(target)} <- {_name(moment)}{'' if diagonal else ', no diagonal'}",
            {
                "table": "*i64",
                **dict.fromkeys(("aligned_rows", "rows", "columns", "key"), "i32"),
                "numbers": "*fp64" if compute_dtype(moment, target) == torch.float64 else "*fp32",
            },
            {**constants, "DIAGONAL": diagonal},
            config.num_warps,
            [
                *(_wide_access("load", f"tl.load({tensors} + here", aligned, moment, constants) for tensors in read),
                _wide_access("store", "tl.store(targets", aligned, target, constants),
            ],
            aligned=("table",),
        )


def _wide_access(
    operation: str, statement: str, branch: str, dtype: torch.dtype, constants: Mapping[str, Any]
) -> Access:
    return Access(
        operation, statement, branch, constants["VECTOR"] * dtype.itemsize, constants["BLOCK"] * dtype.itemsize
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
