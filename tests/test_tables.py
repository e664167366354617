"""The tables say what is in the CSV files, whichever there are."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest

from benchmarks.providers import CACHED, OURS, TORCH
from benchmarks.tables import blocks, markdown, results
from benchmarks.tables.files import gpus, load, rows_of, verdicts
from benchmarks.weight_averages import LISTS, NEAREST, ONE_PASS, PASSES, STOCHASTIC, TIMM
from tests.measurement_files import update, write

ORIGIN = "2 threads of an AMD EPYC, torch 2.13.0: `python -m benchmarks"


def made(folder: Path, name: str) -> str:
    return blocks.BLOCKS[name](load(folder))


def test_examples() -> None:
    assert doctest.testmod(markdown).attempted
    assert not doctest.testmod(markdown).failed


def test_the_update_names_the_quickest_other_and_where_fastswa_loses(tmp_path: Path) -> None:
    ours = {"ratio_p20": 1, "ratio_p80": 1}
    rows = [
        update("resnet20", OURS, "70.04", "1", **ours),
        update("resnet20", TORCH, "945.2", "13.5"),
        update("resnet20", CACHED, "60.6", "0.866"),
        update("resnet20", "torch_ema", "55", "0.786", checked="yes, parameters only"),
        update("resnet20", "broken", "", "", checked="wrong: w is off by 1"),
        update("resnet20", "ceiling", "14", "0.2", checked="averages nothing"),
        update("resnet50", OURS, "5466", "1", **ours, disturbed=5),
        update("resnet50", TORCH, "1.89e+04", "3.458", disturbed=5),
        update("resnet50", CACHED, "6000", "1.1"),
        update("gpt2", OURS, "2.5e+04", "1", **ours, plan="mixed"),
        update("gpt2", CACHED, "", "", plan="mixed", checked="skipped: RuntimeError: no such dtype"),
        update("vit_b", OURS, "1000", "1", **ours, plan="mixed"),
    ]
    write(tmp_path / "cpu.csv", "update --device cpu", rows)
    lines = made(tmp_path, "update").splitlines()
    table = [line for line in lines if line.startswith("| ")][1:]
    assert table == [
        "| ResNet-20 | 0.0700 | 0.945 | 0.0550, torch\\_ema (parameters only) | 13.5 (12.2 to 14.8) | "
        "0.786 (0.707 to 0.865) |",
        "| ResNet-50 | 5.47\\* | 18.9\\* | 6.00, cached \\_foreach\\_lerp\\_ | 3.46 (3.11 to 3.80) | "
        "1.10 (0.990 to 1.21) |",
        "| GPT-2, bfloat16 weights, float32 average | 25.0 | - | none can | - | - |",
    ]
    text = " ".join(lines)
    assert "Quicker than fastswa: torch\\_ema on ResNet-20. Times marked with a star" in text
    # The disturbed one is no gain that holds.
    assert text.startswith(
        "13.5 to 13.5 times as fast as torch's `AveragedModel`. Milliseconds of one update on 2 threads"
    )
    assert "`python -m benchmarks update --device cpu` ([rows](benchmarks/results/cpu.csv))" in text
    assert lines[-1] == "On a GPU: not measured yet."


def test_a_gpu_is_shown_when_it_was_measured(tmp_path: Path) -> None:
    def row(provider: str, wall: float, ratio: float) -> dict[str, Any]:
        return update("resnet50", provider, "90", "1", wall_us=wall, wall_ratio_to_fastswa=ratio)

    rows = [row(OURS, 100, 1), row(TORCH, 2500, 25), row(CACHED, 220, 2.2)]
    write(tmp_path / "nvidia-h200.csv", "update --device cuda", rows, device="NVIDIA H200")
    files = load(tmp_path)
    assert gpus(files) == ["NVIDIA H200"]
    text = made(tmp_path, "update")
    # Until the device is done, not the time on the device alone.
    assert "| ResNet-50 | 0.100 | 2.50 | 0.220, cached \\_foreach\\_lerp\\_ | 25.0 | 2.20 |" in text
    assert "Milliseconds of one update on NVIDIA H200, torch 2.13.0" in text
    assert "not measured" not in text
    page = results.page(files, {})
    asked = "update, ResNet-50, float32 | >= 20 times as fast as torch AveragedModel, end to end"
    assert f"| NVIDIA H200 | {asked} | 25.0 | met |" in page
    assert not rows_of(files, "update", "cpu")
    assert len(verdicts(files, "NVIDIA H200")) > 10


def test_without_files_nothing_is_claimed(tmp_path: Path) -> None:
    for name, block in blocks.BLOCKS.items():
        assert block([]).lower().strip().endswith("not measured yet."), name
    page = results.page(load(tmp_path), {})
    assert page.endswith("## GPU\n\nnot measured yet\n")
    assert (
        "met" not in page.split("## Targets")[1].replace("not measured yet", "").replace("Where a target", "").split()
    )


def test_a_file_without_rows_is_no_measurement(tmp_path: Path) -> None:
    write(tmp_path / "cpu.csv", "update", [update("resnet50", OURS, "100", "1")])
    (tmp_path / "integrations-cpu.csv").write_text("timestamp,device\n")
    assert [file.path.name for file in load(tmp_path)] == ["cpu.csv"]
    (tmp_path / "integrations-cpu.csv").write_text("timestamp,device\n2026,cpu\n")
    with pytest.raises(ValueError, match=r"integrations-cpu\.csv has no column 'cpu', "):
        load(tmp_path)


def test_sentences(tmp_path: Path) -> None:
    times = {ONE_PASS: "1.62e+04", PASSES: "21700", LISTS: "20100"}
    rows = [update("resnet50", name, time, "1", plan="fp32_k4") for name, time in times.items()]
    rounded = {STOCHASTIC: "1760", TIMM: "1350", NEAREST: "154"}
    rows += [update("resnet20", name, time, "1", plan="bf16_stochastic") for name, time in rounded.items()]
    write(tmp_path / "cpu.csv", "update", rows)
    assert " ".join(made(tmp_path, "several_averages").split()) == (
        "Four averages of ResNet-50 in one pass take 16.2 ms, a pass each 21.7 ms, cached lists a list each 20.1 ms. "
        "One bfloat16 average of ResNet-20 with stochastic rounding takes 1.76 ms, timm's 1.35 ms; to nearest "
        "0.154 ms. "
        f"{ORIGIN} update` ([rows](benchmarks/results/cpu.csv))."
    )
    steps = [
        {"case": "digits", "provider": provider, "step_p50_us": "19000", "share_of_step": share}
        for provider, share in ((OURS, "0.0213"), (TORCH, "0.105"), ("skipped", ""))
    ]
    write(tmp_path / "step-cpu.csv", "step", steps)
    assert " ".join(made(tmp_path, "step").split()).startswith(
        "Of a training step of the demo's network (19.0 ms without it), averaging takes 2.13 % with fastswa "
        "AveragedModel and 10.5 % with torch AveragedModel. 2 threads"
    )


def test_batch_norm(tmp_path: Path) -> None:
    def row(provider: str, time: str, ratio: str, reads: int) -> dict[str, Any]:
        values = {"case": "preresnet164", "precision": "fp32", "batches_from": "device", "provider": provider}
        values |= {
            "batch_size": 128,
            "p50_ms": time,
            "ratio_to_fastswa": ratio,
            "ratio_p20": "0.99",
            "ratio_p80": "1.03",
        }
        return {**values, "device_reads_per_batch": reads}

    rows = [row("fastswa update_bn", "895.1", "1", 0), row("torch update_bn", "897", "1.002", 163)]
    write(tmp_path / "update_bn-cpu.csv", "update_bn", rows)
    assert " ".join(made(tmp_path, "update_bn").split()) == (
        "Times a batch: PreResNet-164 at batch 128: 895 ms, torch 897, 1.00 (0.990 to 1.03) times torch's speed, "
        f"device reads 0, torch 163. {ORIGIN} update_bn` ([rows](benchmarks/results/update_bn-cpu.csv)). "
        "On a GPU: not measured yet."
    )


def test_methods_are_compared_seed_by_seed(tmp_path: Path) -> None:
    results = {"SGD": [(1, 90.0, 0.3), (0, 80.0, 0.5)], "SWA": [(0, 83.0, 0.4), (1, 91.0, 0.2)]}
    rows = [
        {"method": method, "seed": seed, "test_accuracy": accuracy, "test_loss": loss}
        for method, of_seeds in results.items()
        for seed, accuracy, loss in of_seeds
    ]
    write(tmp_path / "digits-cpu.csv", "methods", rows)
    text = made(tmp_path, "methods")
    # Deviations of a sample: 90 and 80 lie 7.07 apart from their mean in that sense, gains of 3 and 1 lie 1.41.
    assert "| SGD | 85.00 ± 7.07 | 0.400 ± 0.141 | |" in text
    assert "| SWA | 87.00 ± 5.66 | 0.300 ± 0.141 | +2.00 ± 1.41 |" in text


def test_the_page_of_measurements_holds_every_row(tmp_path: Path) -> None:
    rows = [update("resnet50", name, time, "3.458", host_us="") for name, time in ((TORCH, "1.89e+04"), ("a|b", ""))]
    write(tmp_path / "cpu.csv", "update", rows)
    page = results.page(load(tmp_path), {"update.png": ("cpu.csv",), "other.png": ("swap-cpu.csv",)})
    assert "\n## cpu.csv\n" in page
    assert "2 threads of AMD EPYC; fastswa 0.1.0, torch 2.13.0+cpu, triton 3.7.1, python 3.11.7; 2026-11-23." in page
    assert "`python -m benchmarks update`" in page
    assert "| 59 | 57 | 18900 | 0.5 | 3.458 (3.112 to 3.804) | 0 | yes |" in page
    assert "| a\\|b | 59 | 57 | | 0.5 |" in page
    assert "host us" not in page
    assert "![update](update.png)" in page
    assert "other.png" not in page
