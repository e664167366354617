"""The pictures of the measurements show what the committed CSV files hold, and benchmarks/README.md shows them."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from benchmarks.__main__ import COMMANDS, main
from benchmarks.pictures import several_averages, update, update_bn
from benchmarks.pictures.bars import HATCH, colours
from benchmarks.pictures.measurements import milliseconds, origin
from benchmarks.record import RESULTS
from benchmarks.report import README as MAIN_README
from benchmarks.report import pictures, source

BENCHMARKS = RESULTS.parent
README = BENCHMARKS / "README.md"


def rows_of(file: str) -> list[dict[str, str]]:
    """A file's rows, the columns named by the first word of their heading."""
    with (RESULTS / file).open(newline="") as lines:
        return [{name.split(" ")[0]: value for name, value in row.items()} for row in csv.DictReader(lines)]


def drawn(axes: Axes) -> list[tuple[float, str, tuple[float, float, float], bool]]:
    """Length, text, colour and hatch of each bar, from the top down."""
    found = []
    for bar, text in zip(axes.patches, axes.texts, strict=True):
        assert text.xy == pytest.approx((bar.get_width(), bar.get_y() + bar.get_height() / 2))
        found.append((bar.get_width(), text.get_text(), to_rgb(bar.get_facecolor()), bar.get_hatch() == HATCH))
    places = [bar.get_y() for bar in axes.patches]
    assert places == sorted(places)
    assert axes.yaxis_inverted()
    return found


def named(figure: Figure) -> dict[str, tuple[float, float, float]]:
    """The colours of a figure's legends."""
    legends = [legend for part in (figure, *figure.subfigs) for legend in part.legends]
    return {
        text.get_text(): to_rgb(handle.get_facecolor())
        for legend in legends
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
    }


def compared(file: str, plan: str) -> list[dict[str, str]]:
    """What has a bar: not the ceiling, which is the unit."""
    return [row for row in rows_of(file) if row["plan"] == plan and row["provider"] != "ceiling"]


def mostly_disturbed(row: dict[str, str]) -> bool:
    return int(row["disturbed"]) > int(row.get("rounds") or 9) / 2


@pytest.mark.parametrize(
    ("module", "plans"),
    [(update, ["fp32", "mixed"]), (several_averages, ["fp32_k2", "fp32_k4", "bf16_stochastic"])],
)
def test_updates_are_shares_of_the_ceiling(module: ModuleType, plans: list[str]) -> None:
    figure = module.draw(RESULTS)
    legend, every = named(figure), []
    (file,) = module.FILES
    for axes, plan in zip(figure.axes, plans, strict=True):
        rows = compared(file, plan)
        assert len(rows) >= 3
        for (length, text, colour, hatched), row in zip(drawn(axes), rows, strict=True):
            assert colour == legend[row["provider"]]
            if row["share_of_ceiling"]:
                assert length == 100 * float(row["share_of_ceiling"])
                assert float(text.removesuffix(" ms")) == pytest.approx(float(row["p50_us"]) / 1000, rel=0.006)
                assert length < axes.get_xlim()[1]
            else:
                assert length == 0
                assert row["checked"].startswith(text)
                assert text.startswith("skipped: ")
            assert hatched == mostly_disturbed(row)
        elements = dict.fromkeys(f"{float(row['elements']) / 1e6:.3g}" for row in rows)
        labels = [re.fullmatch(r"(.+)\n(.+) M weights", label.get_text()) for label in axes.get_yticklabels()]
        assert [label[2] for label in labels if label] == list(elements)
        every += rows
    first, below = every[0], figure.get_supxlabel()
    assert f"{first['threads']} threads of {first['cpu']}, torch {first['torch']}: {first['command']}" in below
    assert any(label.startswith("hatched") for label in legend) == any(map(mostly_disturbed, every))


def test_update_bn_in_milliseconds() -> None:
    figure = update_bn.draw(RESULTS)
    legend, rows = named(figure), rows_of("update_bn-cpu.csv")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for axes, case in zip(figure.axes, cases, strict=True):
        own = [row for row in rows if row["case"] == case]
        for (length, text, colour, hatched), row in zip(drawn(axes), own, strict=True):
            assert length == float(row["p50_ms"])
            time, reads = re.fullmatch(r"([\d.]+) ms, (\d+) reads", text).groups()  # type: ignore[union-attr]
            assert float(time) == pytest.approx(length, rel=0.006)
            assert reads == row["device_reads_per_batch"]
            assert (colour, hatched) == (legend[row["provider"]], False)
        assert axes.get_title("left").endswith(f"batch {own[0]['batch_size']}, {own[0]['layers']} layers")


def test_texts() -> None:
    assert [milliseconds(time) for time in (0.0606, 0.44, 19, 99.949, 99.96, 2341)] == [
        *("0.0606 ms", "0.440 ms", "19.0 ms", "99.9 ms", "100 ms", "2341 ms"),
    ]
    row = {"device": "cpu", "cpu": "AMD EPYC", "threads": "2", "torch": "2.13.0", "command": "python -m benchmarks x"}
    gpu = {**row, "device": "NVIDIA H200"}
    assert origin([row, row]) == "2 threads of AMD EPYC, torch 2.13.0: python -m benchmarks x"
    assert origin([row, gpu]).splitlines()[1] == "NVIDIA H200, torch 2.13.0: python -m benchmarks x"


def test_providers_are_told_apart() -> None:
    found = colours(["fastswa a", "torch a", "timm", "fastswa b", "cached", "fastswa a"])
    assert list(found) == ["fastswa a", "torch a", "timm", "fastswa b", "cached"]
    assert len(set(found.values())) == 5
    with pytest.raises(ValueError, match="no shade is left for the provider 'torch c'"):
        colours(["torch a", "torch b", "torch c"])


def test_a_file_without_a_column_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results, ignore=shutil.ignore_patterns("*.png"))
    path = results / "update_bn-cpu.csv"
    whole = path.read_text()
    path.write_text(whole.replace("p50_ms", "median_ms", 1))
    with pytest.raises(ValueError, match=f"{path} has no column 'p50_ms'"):
        update_bn.draw(results)
    path.write_text(whole.splitlines()[0])
    with pytest.raises(ValueError, match=f"{path} has no rows"):
        update_bn.draw(results)

    command = ["report", "--results", str(results), "--output", str(tmp_path / "pictures")]
    command += ["--readme", str(tmp_path / "README.md")]
    path.write_text(whole)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: step -->\n<!-- end -->")
    path = results / "cpu.csv"
    path.write_text(path.read_text().replace("share_of_ceiling", "share", 1))
    assert main(command) == 1
    assert f"update.png: {path} has no column 'share_of_ceiling'" in capsys.readouterr().err
    path.unlink()
    (results / "step-cpu.csv").unlink()
    assert main(command) == 0
    assert "update.png: not drawn, cpu.csv is not there" in capsys.readouterr().out
    assert "not measured yet" in readme.read_text()
    readme.write_text("<!-- table: steps -->\n<!-- end -->")
    assert main(command) == 1
    assert "no table is called 'steps'" in capsys.readouterr().err


def test_the_command_draws_what_is_committed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(MAIN_README, tmp_path / "main.md")
    assert main(["report", "--output", str(tmp_path), "--readme", str(tmp_path / "main.md")]) == 0
    assert (tmp_path / "main.md").read_text() == MAIN_README.read_text()
    assert (tmp_path / "README.md").read_text() == (RESULTS / "README.md").read_text()
    there = {
        name: module for name, module in pictures().items() if all((RESULTS / file).exists() for file in module.FILES)
    }
    assert there
    printed = capsys.readouterr().out
    for name, module in there.items():
        assert f"{tmp_path / name} from {', '.join(module.FILES)}" in printed
        with Image.open(tmp_path / name) as new, Image.open(RESULTS / name) as committed:
            assert new.size == committed.size
            expected = source(RESULTS, module.FILES)
            assert new.text["Source"] == expected  # type: ignore[attr-defined]
            stale = f"{name} shows other numbers than its CSV files: python -m benchmarks report"
            assert committed.text["Source"] == expected, stale  # type: ignore[attr-defined]
        assert (RESULTS / name).stat().st_size < 300_000
        assert imread(RESULTS / name).std() > 0


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.png")), ids=lambda path: path.name)
def test_pictures_are_readable_on_any_page(path: Path) -> None:
    with Image.open(path) as picture:
        pixels = picture.convert("RGBA")
    # A white card, whatever the page's colour: nothing of the page shines through.
    assert pixels.getextrema()[3] == (255, 255)
    corners = [(x, y) for x in (0, pixels.width - 1) for y in (0, pixels.height - 1)]
    assert {pixels.getpixel(corner) for corner in corners} == {(255, 255, 255, 255)}


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "benchmarks.pictures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("benchmarks.pictures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install fastswa\[demo\]"):
        pictures()


def test_the_readme_names_every_command_and_shows_their_pictures() -> None:
    text = README.read_text()
    for command in COMMANDS:
        assert re.search(rf"python -m benchmarks {command}\b", text), f"{command} is not in benchmarks/README.md"
    shown = set()
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        commands = set(re.findall(r"python -m benchmarks (\w+)", section))
        assert commands <= set(COMMANDS)
        for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", section):
            assert (BENCHMARKS / path).is_file(), path
            name = f'"{Path(path).name}"'
            drawing = [command for command in commands if name in (BENCHMARKS / f"{command}.py").read_text()]
            assert drawing, f"no command beside {path} draws it"
            shown.add(BENCHMARKS / path)
    assert shown == set(RESULTS.rglob("*.png"))
    for link in re.findall(r"\[[^\]]+\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (BENCHMARKS / link).exists(), link
