"""The parts of a Markdown page that are generated, between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from benchmarks.tables.files import File
from benchmarks.tables.methods import methods
from benchmarks.tables.several_averages import several_averages
from benchmarks.tables.step import step
from benchmarks.tables.update import update
from benchmarks.tables.update_bn import update_bn

BLOCKS: Mapping[str, Callable[[Sequence[File]], str]] = {
    function.__name__: function for function in (methods, several_averages, step, update, update_bn)
}
BLOCK = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def rewritten(page: str, files: Sequence[File]) -> str:
    """A page with its generated parts made anew.

    Args:
        page: its text.
        files: of the folder of measurements.

    Raises:
        ValueError: a mark names no part, or has no end.
    """
    names = re.findall(r"<!-- table: (.*?) -->", page)
    if unknown := set(names) - set(BLOCKS):
        raise ValueError(f"no table is called {', '.join(map(repr, sorted(unknown)))}; there are {', '.join(BLOCKS)}")
    if len(BLOCK.findall(page)) != len(names):
        raise ValueError("a table's mark has no `<!-- end -->` before the next one")
    return BLOCK.sub(lambda found: f"<!-- table: {found[1]} -->\n{BLOCKS[found[1]](files)}\n<!-- end -->", page)
