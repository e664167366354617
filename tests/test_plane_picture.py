"""Levels, labels and contours of a plane's picture, and the command that draws the paper's figure."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation

from benchmarks import plane
from benchmarks.__main__ import main
from fastswa.plane import Coordinates, PlaneGrid, plot
from fastswa.plane.levels import contour_levels, level_labels
from tests.plane import one_thread  # noqa: F401 - a fixture

X, Y = np.linspace(-1.0, 3.0, 21), np.linspace(-0.5, 2.5, 16)

BOWL = 0.02 + (X[None] - 1.0) ** 4 + 2 * (Y[:, None] - 0.5) ** 2


def grid_of(**values: np.ndarray) -> PlaneGrid:
    return PlaneGrid(X, Y, {"x of w2": 2.0, "x of w3": 1.5, "y of w3": 1.75}, values)


def contours(axes: Axes) -> list[ContourSet]:
    return [each for each in axes.collections if isinstance(each, ContourSet)]


def labels(axes: Axes) -> dict[str, Annotation]:
    return {text.get_text(): text for text in axes.texts if isinstance(text, Annotation)}


def marks(axes: Axes) -> dict[tuple[float, float], str]:
    return {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])): line.get_marker()
        for line in axes.lines
        if len(line.get_xdata()) == 1
    }


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
@pytest.mark.parametrize("low", [0.0, 2.37, 1234.5])
def test_levels_resolve_what_is_flat(low: float, scale: float) -> None:
    values = low + scale * BOWL
    levels = contour_levels(values, 10)
    assert 5 <= len(levels) <= 10
    assert (np.diff(levels) > 0).all()
    assert levels[0] <= values.min()
    # Between 3 % and 95 % of the area; rounding moves a level by up to half of a gap.
    assert (values < levels[1]).mean() < 0.06
    assert (values > levels[-1]).mean() < 0.12
    # No band takes half of the picture, as equal distances would make the lowest do.
    shares = np.histogram(values, levels)[0] / values.size
    assert shares.max() < 0.35
    assert (values < np.linspace(values.min(), values.max(), 10)[1]).mean() > 0.35
    words = level_labels(levels)
    assert [float(word) for word in words] == levels.tolist()
    assert max(map(len, words)) <= 13


def test_levels_of_few_values() -> None:
    assert contour_levels(np.full((3, 3), 2.0)).tolist() == pytest.approx([1.8, 2.0, 2.2])
    assert (np.diff(contour_levels(np.array([[0.0, 1.0], [1.0, 1.0]]))) > 0).all()
    with_gaps = np.where(BOWL > 5, np.nan, BOWL)
    assert np.array_equal(contour_levels(with_gaps), contour_levels(BOWL[BOWL <= 5]))
    with pytest.raises(ValueError, match="no value is finite"):
        contour_levels(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="count must be at least 3, got 2"):
        contour_levels(BOWL, 2)


def test_a_picture() -> None:
    axes = plot(grid_of(loss=BOWL, error=-BOWL), "loss")
    filled, lines = contours(axes)
    assert (filled.filled, lines.filled) == (True, False)
    assert np.array_equal(filled.levels, contour_levels(BOWL))
    assert np.array_equal(lines.levels, filled.levels)
    assert filled.extend == "max"
    # The bands, with the one above all levels, are equal steps on the map; a step of its 256 colours is below 0.02.
    bands = colormaps["viridis"](np.linspace(0, 1, len(filled.levels)))
    assert np.abs(filled.get_facecolor() - bands).max() < 0.02
    assert axes.get_aspect() == 1.0
    assert marks(axes) == dict.fromkeys([(0.0, 0.0), (2.0, 0.0), (1.5, 1.75)], "o")
    assert {text: label.xy for text, label in labels(axes).items()} == {
        "$w_1$": (0.0, 0.0),
        "$w_2$": (2.0, 0.0),
        "$w_3$": (1.5, 1.75),
    }
    assert "w_2 - w_1" in axes.get_xlabel()
    assert "orthogonal" in axes.get_ylabel()
    bar = axes.child_axes[0]
    assert bar.get_ylabel() == "loss"
    assert [text.get_text() for text in bar.get_yticklabels()] == level_labels(filled.levels)
    assert (axes.get_xlim(), axes.get_ylim()) == ((X[0], X[-1]), (Y[0], Y[-1]))


def test_marks() -> None:
    points = {
        "first": (0.0, 0.0),
        "SWA": Coordinates(1.2, 0.6, 0.25),
        "near": Coordinates(0.5, 0.5, 0.001),
        "corner": (3.0, 2.5),
    }
    axes = plot(grid_of(loss=BOWL), "loss", points=points)
    assert marks(axes) == {(0.0, 0.0): "o", (1.2, 0.6): "*", (0.5, 0.5): "*", (3.0, 2.5): "*"}
    assert list(labels(axes)) == ["first", "SWA\n0.25 off the plane", "near", "corner"]


def test_labels_cover_neither_each_other_nor_marks() -> None:
    points = {f"point {number}": (1.0 + 0.25 * np.cos(number), 0.5 + 0.25 * np.sin(number)) for number in range(6)}
    points["edge"] = (2.95, 1.0)
    axes = plot(grid_of(loss=BOWL), "loss", points=points)
    axes.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in labels(axes).values()]
    assert len(boxes) == 7
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert not any(box.contains(*pixel) for pixel in axes.transData.transform(list(points.values())))
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1


def test_levels_axes_and_values_of_ones_own() -> None:
    left, right = Figure().subplots(1, 2)
    assert plot(grid_of(loss=BOWL), "loss", axes=right, levels=[0.1, 1.0, 2.0]) is right
    assert contours(right)[0].levels.tolist() == [0.1, 1.0, 2.0]
    assert contours(right)[0].extend == "both"
    assert not left.collections
    plot(grid_of(loss=BOWL), "loss", axes=left, levels=[0.0, 100.0])
    assert contours(left)[0].extend == "neither"
    with pytest.raises(KeyError, match=r"no value 'error'; it has \['loss'\]"):
        plot(grid_of(loss=BOWL), "error")


def test_points_without_a_value_stay_white_and_diverged_ones_do_not(tmp_path: Path) -> None:
    def colours(values: np.ndarray) -> np.ndarray:
        axes = plot(grid_of(loss=values), "loss", points={}, levels=[0.0, 1.0, 4.0])
        axes.set_axis_off()
        axes.figure.savefig(tmp_path / "plane.png")
        picture = imread(tmp_path / "plane.png")
        column, row = axes.transData.transform((2.8, 2.3))
        return picture[int(len(picture) - row), int(column), :3]

    corner = (X[None] > 2.4) & (Y[:, None] > 1.9)
    high, unknown, diverged = (colours(np.where(corner, value, BOWL)) for value in (1e6, np.nan, np.inf))
    assert unknown.tolist() == [1, 1, 1]
    assert diverged.tolist() == high.tolist() != [1, 1, 1]


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_formats(tmp_path: Path, ending: str, start: bytes) -> None:
    path = tmp_path / f"plane.{ending}"
    plot(grid_of(loss=BOWL), "loss", path=path)
    assert path.read_bytes().startswith(start)


def test_what_is_missing_is_named_and_pyplot_is_left_alone() -> None:
    program = """
import sys
import numpy as np
from fastswa.plane import PlaneGrid, plot
assert "matplotlib" not in sys.modules
x = np.linspace(0, 1, 3)
grid = PlaneGrid(x, x, {"x of w2": 1.0, "x of w3": 0.5, "y of w3": 1.0}, {"loss": x + x[:, None]})
plot(grid, "loss")
assert "matplotlib.pyplot" not in sys.modules
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    sys.modules[name] = None
try:
    plot(grid, "loss")
except ImportError as error:
    assert str(error) == "plot needs matplotlib: pip install fastswa[plot]", error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "plane"
    arguments = ["plane", "--epochs", "4", "--swa-start", "1", "--points", "3", "--output", str(output)]
    assert main(arguments) == 0
    heading, *table = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0].strip() == "learning rate"
    assert [line.split()[:2] for line in table] == [
        [schedule, weights] for schedule in ("constant", "cyclical") for weights in ("first", "middle", "last", "SWA")
    ]
    with (output / "models.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["schedule"] == "cyclical"]
    assert [row["weights"] for row in rows] == ["first", "", "middle", "last", "SWA"]
    assert [row["iteration"] for row in rows] == ["10", "20", "30", "40", "40"]
    grid = PlaneGrid.load(output / "cyclical.npz")
    assert grid.done.all()
    for row, place in zip((rows[0], rows[2], rows[3]), grid.points, strict=True):
        # Four digits in the file.
        assert (float(row["x"]), float(row["y"])) == pytest.approx(place, rel=1e-3, abs=1e-5)
        assert float(row["distance"]) < 1e-5
    assert float(rows[4]["distance"]) > 0.01
    picture = output / "plane.png"
    assert picture.stat().st_size < 300_000
    assert imread(picture).std() > 0

    monkeypatch.setattr(plane, "draw", lambda path, walks: None)
    written = (output / "cyclical.npz").stat().st_mtime_ns
    other = PlaneGrid.load(output / "constant.npz")
    PlaneGrid(other.x[:2], other.y, other.plane).save(output / "constant.npz")
    assert main(arguments) == 0
    assert "constant.npz is of another run and is made anew: its x has 2 coordinates" in capsys.readouterr().out
    assert np.array_equal(PlaneGrid.load(output / "constant.npz").values[plane.LOSS], other.values[plane.LOSS])
    assert (output / "cyclical.npz").stat().st_mtime_ns == written, "nothing was left to be done"
    assert main([*arguments, "--swa-start", "3"]) == 2
    assert "SWA took 2 models, and a plane needs 3" in capsys.readouterr().err
