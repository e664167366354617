"""The Python code in Markdown files, so that tests can run what a reader is told to write."""

from __future__ import annotations

import re
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[1]


def code_blocks(path: Path, device: str = "cpu") -> list[CodeType]:
    """The blocks marked as Python, in their order.

    Args:
        path: of a Markdown file.
        device: to take the place of the GPU that the code names.

    Returns:
        Compiled blocks; tracebacks name the file and its line.
    """
    text = path.read_text()
    blocks = []
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, found.start(1))
        source = found[1].replace('device="cuda"', f'device="{device}"')
        blocks.append(compile("\n" * line + source, str(path), "exec"))
    return blocks


def run_blocks(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Run the blocks one after another.

    Args:
        path: of a Markdown file.
        device: to take the place of the GPU that the code names.

    Returns:
        The names that they define.
    """
    names: dict[str, Any] = {"__name__": path.stem}
    blocks = code_blocks(path, device)
    assert blocks, f"{path} has no Python code"
    for block in blocks:
        exec(block, names)
    return names
