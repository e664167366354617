"""Every measured number in README.md comes from a committed CSV file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.record import RESULTS
from benchmarks.report import README, pictures
from benchmarks.tables import results
from benchmarks.tables.blocks import BLOCK, BLOCKS, rewritten
from benchmarks.tables.files import load

QUOTED = re.compile(r"<!-- quoted: (.+?) -->\n.*?<!-- end -->", re.DOTALL)
"""Figures of others, whose source the mark names."""
# Code shows options and comments, and where a link leads is no prose.
NO_PROSE = re.compile(r"^```.*?^```$|`[^`\n]+`|\]\([^)]*\)", re.DOTALL | re.MULTILINE)
# Releases are no measurements.
RELEASE = re.compile(r"\b(Python|torch|triton) \d+(\.\d+)+")
FIGURE = re.compile(
    r"\d[\d.,]*\s*(?:ms|us|µs|ns|s|seconds?|minutes?|[KMG]B/s|times|x|×|%|percent)(?![\w-])|\b\d+\.\d+\b"
)
"""A number with a unit of time, speed or proportion, or with a decimal point whatever its unit."""


def figures(page: str) -> list[str]:
    """The measured figures in a page's prose and hand-written tables."""
    for left_out in (BLOCK, QUOTED, NO_PROSE, RELEASE):
        page = left_out.sub(" ", page)
    return FIGURE.findall(page)


def test_marked_tables_are_what_the_files_say() -> None:
    page = README.read_text()
    assert page == rewritten(page, load(RESULTS)), "python -m benchmarks report"
    # A table that is not shown tells nobody anything.
    assert {name for name, _ in BLOCK.findall(page)} == set(BLOCKS)


def test_no_measured_figure_stands_outside_the_marked_tables() -> None:
    assert figures(README.read_text()) == []


def test_quoted_figures_name_a_source_that_is_listed() -> None:
    page = README.read_text()
    references = page.partition("## References")[2]
    for source in QUOTED.findall(page):
        author, year = re.fullmatch(r"(\w+) et al\. (\d{4}), .+", source).groups()  # type: ignore[union-attr]
        assert author in references
        assert year in references


@pytest.mark.parametrize(
    ("prose", "expected"),
    [
        ("an update takes 5.47 ms on a CPU", ["5.47 ms"]),
        ("it is 14 times as fast, or 3x, or 20 % less", ["14 times", "3x", "20 %"]),
        ("| ResNet-50 | 18.9 |", ["18.9"]),
        ("at 1,930 GB/s", ["1,930 GB/s"]),
        ("in 2 minutes", ["2 minutes"]),
        ("```\n5.47 ms\n```\nand `sigma_rel=0.05` and [rows](results/1.5.csv)", []),
        ("Python 3.11, torch 2.13.0 and triton 3.7.1", []),
        ("128-bit accesses, 4 bytes, 20 samples, 16384 elements, ResNet-50, sm_80, 2024", []),
        ("<!-- table: update -->\n5.47 ms\n<!-- end -->", []),
        ("<!-- quoted: Izmailov et al. 2018, table 1 -->\n95.28\n<!-- end -->", []),
    ],
)
def test_figures_are_found(prose: str, expected: list[str]) -> None:
    assert figures(prose) == expected


def test_the_page_of_measurements_is_what_the_files_say() -> None:
    sources = {name: module.FILES for name, module in pictures().items()}
    assert (RESULTS / "README.md").read_text() == results.page(load(RESULTS), sources), "python -m benchmarks report"


def test_marks_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table is called 'speed'; there are methods, "):
        rewritten("<!-- table: speed -->\n<!-- end -->", [])
    with pytest.raises(ValueError, match="has no `<!-- end -->`"):
        rewritten("<!-- table: step -->\n\n<!-- table: update -->\n<!-- end -->", [])
