"""The bandwidth that an update's kernels reach on a GPU, as Nsight Compute's counters see it. Not run on a GPU yet.

`python -m benchmarks update --device cuda` runs it where `ncu` is on the PATH; it starts this file under `ncu`.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.cases import Shapes
from benchmarks.providers import OURS, PLANS, PROVIDERS, update_bytes

CASES = ("resnet50", "gpt2")
PLANS_HERE = ("fp32", "mixed")
DURATION = "gpu__time_duration.sum"
BANDWIDTH = "dram__bytes.sum.per_second"
SHARE = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
LIMIT_SECONDS = 120


@dataclass(frozen=True)
class Row(record.Environment):
    """One kernel of one update of fastswa's AveragedModel.

    Args:
        case: a key of `cases.CASES`.
        plan: a key of `providers.PLANS`.
        kernel: its name.
        bytes: that the update must move.
        duration_us: of the kernel, at the clocks to which ncu locks the GPU.
        dram_gb_per_second: moved to and from the GPU's memory.
        share_of_peak: of the memory's bandwidth, 0 to 1.
    """

    case: str
    plan: str
    kernel: str
    bytes: int
    duration_us: float
    dram_gb_per_second: float
    share_of_peak: float


def run(device: torch.device, command: str, output: Path | None) -> None:
    """Profile, print a line for each kernel, write a CSV file beside the one of the updates; or say why not.

    Args:
        device: to be profiled.
        command: to be recorded.
        output: of the updates; None for the default.
    """
    tool = shutil.which("ncu")
    if device.type != "cuda" or tool is None:
        print("ncu: not measured: " + ("needs a GPU" if device.type != "cuda" else "there is no ncu on the PATH"))
        return
    facts = record.environment(device, command)
    rows: list[Row] = []
    for case, plan in product(CASES, PLANS_HERE):
        profiled = [*(tool, "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off")]
        profiled += ["--metrics", ",".join((DURATION, BANDWIDTH, SHARE)), sys.executable, "-m", "benchmarks.ncu"]
        try:
            done = subprocess.run([*profiled, case, plan], capture_output=True, text=True, timeout=LIMIT_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"ncu: {case} {plan}: not measured: {error}")
            return
        size = update_bytes(Shapes(case, PLANS[plan].source, "meta"), PLANS[plan])
        kernels = parse(done.stdout)
        if not kernels:
            print(f"ncu: {case} {plan}: not measured: {reason(done.stdout + done.stderr)}")
            return
        for name, duration, bandwidth, share in kernels:
            rows.append(
                Row(
                    **facts,  # type: ignore[arg-type]
                    case=case,
                    plan=plan,
                    kernel=name,
                    bytes=size,
                    duration_us=duration / 1e3,
                    dram_gb_per_second=bandwidth / 1e9,
                    share_of_peak=share / 100,
                )
            )
            print(f"ncu: {case} {plan}: {name}: {bandwidth / 1e9:.4g} GB/s of DRAM, {share:.3g} % of its peak")
    path = output.with_name("ncu-" + output.name) if output else record.default_path(device, "ncu-")
    record.write(path, rows, Row)
    print(f"{len(rows)} measurements in {path}")


def parse(printed: str) -> list[tuple[str, float, float, float]]:
    """Read what `ncu --csv --page raw --print-units base` prints.

    Args:
        printed: lines of ncu ("==PROF== ...") and of the program, then a heading, a line of units, and a line a kernel.

    Returns:
        Name, nanoseconds, bytes a second and percent of the peak of each kernel; none where there is no such table.
    """
    lines = printed.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        return []
    found = []
    for row in csv.DictReader(lines[start:]):
        # The line of units has no number.
        if row["ID"] and row.get(DURATION):
            values = [float((row.get(metric) or "nan").replace(",", "")) for metric in (DURATION, BANDWIDTH, SHARE)]
            found.append((row["Kernel Name"], values[0], values[1], values[2]))
    return found


def reason(printed: str) -> str:
    """Why ncu printed no table, in its own words where it gives any.

    Args:
        printed: on both of its outputs.
    """
    errors = [line.removeprefix("==ERROR== ") for line in printed.splitlines() if line.startswith("==ERROR==")]
    return errors[0] if errors else "ncu saw no kernel"


def main(arguments: Sequence[str]) -> None:
    """The program that ncu profiles: one update, after all that happens once.

    Args:
        arguments: a case and a plan.
    """
    case, plan = arguments
    model = Shapes(case, PLANS[plan].source, "cuda")
    update = PROVIDERS[OURS].setup(model, PLANS[plan]).update
    for _ in range(3):
        update()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    update()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
