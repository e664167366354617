"""Every kernel compiles for four GPU targets and keeps its promises there; and the check that says so can fail.

The kernels of this process are interpreted (tests/conftest.py), so the compiler runs in another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.machine_code import Access, accesses

BAD_KERNELS = """
import triton
import triton.language as tl
from benchmarks import ptx
from benchmarks.machine_code import Access, Variant


@triton.jit
def unhinted_kernel(table, BLOCK: tl.constexpr):
    target = tl.load(table).to(tl.pointer_type(tl.float32))
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(target + offsets) + 1.0)


@triton.jit
def sum_kernel(table, BLOCK: tl.constexpr):
    target = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(target, tl.sum(tl.load(tl.multiple_of(target, 16) + tl.arange(0, BLOCK)), 0))


def bad():
    arguments = {"table": "*i64"}, {"BLOCK": 1024}, 4
    promise = Access("store", "tl.store(target", "", 16, 4096)
    yield Variant(unhinted_kernel, "unhinted", *arguments, [promise])
    yield Variant(unhinted_kernel, "no such line", *arguments, [Access("load", "tl.load(nothing", "", 16, 4096)])
    yield Variant(sum_kernel, "shared", *arguments, [])
    yield Variant(sum_kernel, "a little shared", *arguments, [], shared=8)
    yield Variant(sum_kernel, "allowed to share", *arguments, [], shared=16)


ptx.KERNELS = (bad,)
raise SystemExit(ptx.run(None))
"""

RECORDING = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature


class Recorded:
    def __init__(self, kernel):
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.seen = []

    def __getitem__(self, grid):
        return lambda *arguments, **more: self.seen.append(str(self.bind(*arguments, **more)[1]))
"""
"""Launches as Triton itself tells them apart, up to where it would ask for a device."""

SPECIALISATIONS = """
from fastswa_kernels import MultiLerpTable, StochasticRounding, average_launch, average_plan

recorded = average_launch.lerp_kernel = Recorded(average_launch.lerp_kernel)
average_plan.refusal = lambda device: None


def forms(dtype, *updates):
    averages = [[torch.zeros(64, dtype=dtype)] for _ in range(3)]
    recorded.seen.clear()
    table = MultiLerpTable(averages, [torch.zeros(64)])
    for update in updates:
        table.lerp_(*update)
    return len(set(recorded.seen))


values = ([0.5, 0.0, 1.0], [1, 0, 0], [0.1, 0.2, 0.3])
tensor, step, skip = torch.zeros(3), torch.tensor(5), torch.tensor(True)
rounded = [StochasticRounding(seed, step) for seed in (0, 1, 16, -1, 2**63) for step in (0, 1, 16, 2**40)]
print(
    forms(torch.float32, *((weights,) for weights in values)),
    forms(torch.float64, *((weights,) for weights in values)),
    forms(torch.bfloat16, *((values[0], rounding) for rounding in rounded)),
    forms(torch.bfloat16, *((tensor, StochasticRounding(seed, step), skip) for seed in range(20))),
    forms(torch.bfloat16, (tensor,), (values[0],), (tensor, rounded[0]), (tensor, rounded[0], skip)),
)
"""

COMBINATIONS = """
from fastswa_kernels import combine

recorded = combine.combine_kernel = Recorded(combine.combine_kernel)
combine.refusal = lambda device: None
for size in (1, 16, 4096, 100000):
    for count in (1, 2, 9, 16):
        sources, coefficients = [[torch.ones(size)] for _ in range(count)], torch.ones(count + 1, dtype=torch.float64)
        for values in ([0.0] * count, [1] * count, [0.3] * count, coefficients[1:]):
            combine.combine_([torch.zeros(size)], sources, values)
print(len(recorded.seen), len(set(recorded.seen)))
"""

MOMENTS = """
from fastswa_kernels import moments, moments_table, sample

taken = moments.moments_kernel = Recorded(moments.moments_kernel)
drawn = sample.sample_kernel = Recorded(sample.sample_kernel)
moments_table.refusal = lambda device: None
for size in (1, 16, 4096, 100000):
    for count in (1, 2, 11, 20):
        means, variances, sources, *ring = ([torch.ones(size)] for _ in range(3 + count))
        table = moments.MomentsTable(means, variances, sources, ring)
        for weight in (0, 1, 0.5):
            table.moments_(weight, count - 1)
        for seed, step in ((0, 0), (1, 16), (-1, 2**40)):
            for factor in (0.0, 1, 0.3):
                sample.sample_(sources, means, variances, ring, [factor] * count, 1.0, seed=seed, step=step)
print(len(taken.seen), len(set(taken.seen)), len(drawn.seen), len(set(drawn.seen)))
"""


def compile_in_a_process(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}
    if not more:
        environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_every_kernel_keeps_its_promises_on_every_target() -> None:
    result = compile_in_a_process("-m", "benchmarks", "ptx")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        # 16 pairs of dtypes, 3 of them with a second form of the weight; 15 of several averages, of stochastic rounding
        # and of flags; 16 pairs of weighted sums; 16 of moments and 2 other forms; 16 of samples and one without a
        # diagonal; 4 dtypes of batch statistics; 2 layouts, each with 3 + 4 + 4 + 2 widths of 4 dtypes and 4 with more
        # values; 4 merges.
        assert result.stdout.count(f" {target} ") >= 16 + 3 + 15 + 16 + 18 + 17 + 4 + 2 * (13 + 4) + 4
    assert "0 broken promises" in result.stdout


def test_broken_promises_are_found(tmp_path: Path) -> None:
    script = tmp_path / "bad_kernels.py"
    script.write_text(BAD_KERNELS)
    result = compile_in_a_process(str(script))
    assert result.returncode == 1, result.stderr
    broken = [line for line in result.stdout.splitlines() if line.startswith("BROKEN")]
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        here = [line for line in broken if f" {target}:" in line]
        assert any("unhinted" in line and "[4] bytes where 16 bytes were promised" in line for line in here)
        assert any("no such line" in line and "nothing" in line for line in here)
        assert any(" shared," in line and "16 bytes of shared memory where 0 are allowed" in line for line in here)
        assert any("a little shared" in line and "16 bytes" in line and "8 are allowed" in line for line in here)
        assert not any("allowed to share" in line for line in here)


def test_no_value_of_an_argument_compiles_the_kernel_again() -> None:
    result = compile_in_a_process("-c", RECORDING + SPECIALISATIONS)
    assert result.stdout.split() == ["1", "1", "1", "1", "4"], result.stdout + result.stderr


def test_one_compiled_kernel_sums_any_number_of_sources() -> None:
    result = compile_in_a_process("-c", RECORDING + COMBINATIONS)
    assert result.stdout.split() == ["64", "1"], result.stdout + result.stderr


def test_one_compiled_kernel_takes_any_slot_and_one_draws_with_any_number_of_deviations() -> None:
    result = compile_in_a_process("-c", RECORDING + MOMENTS)
    assert result.stdout.split() == ["48", "1", "144", "1"], result.stdout + result.stderr


def test_interpreted_kernels_are_refused() -> None:
    result = compile_in_a_process("-m", "benchmarks", "ptx", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr


def test_accesses_are_read_from_machine_code() -> None:
    ptx = """
        .loc 1 38 18    // kernel.py:38:18 @[ kernel.py:56:57 @[ kernel.py:105:83 ] ]
        @%p56 ld.global.v4.b32 { %r125, %r126, %r127, %r128 }, [ %rd100 + 0 ];
        ld.global.L1::evict_last.v2.b64 {%rd1, %rd2}, [%rd3];
        .loc 1 44 32    // kernel.py:44:32
        st.global.b8 [ %rd43 + 0 ], { %rs1 };
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
    """
    places = (("kernel.py", 38), ("kernel.py", 56), ("kernel.py", 105))
    assert accesses(ptx) == [("load", 16, places), ("load", 16, places), ("store", 1, (("kernel.py", 44),))]
    amd = """
        .loc 1 68 40 is_stmt 0    ; kernel.py:68:40 @[ kernel.py:114:68 ]
        global_load_dwordx4 v[2:5], v8, s[8:9]
        flat_load_dword v9, v[0:1]
        global_store_short v[2:3], v10, off
        buffer_store_dwordx2 v[2:3], v10, s[0:3], 0 offen
        global_load_ubyte v10, v[4:5], off
        s_load_dwordx2 s[2:3], s[0:1], 0x0
    """
    widths = [("load", 16), ("load", 4), ("store", 2), ("store", 8), ("load", 1)]
    places = (("kernel.py", 68), ("kernel.py", 114))
    assert accesses(amd) == [(operation, width, places) for operation, width in widths]


def test_a_promise_is_bounded_by_what_a_thread_has() -> None:
    assert Access("load", "tl.load(source", "", 16, 2048).allowed(128) == 16
    # 64 lanes to a wave on AMD leave each thread four 16-bit elements of 1024.
    assert Access("load", "tl.load(source", "", 16, 2048).allowed(256) == 8
