"""Work in a process that has done nothing else before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process that has run nothing else.

    Args:
        function: importable by its name.
        *arguments: of the function.

    Returns:
        Its result.
    """
    context = get_context("forkserver")
    # Forked from a process that has imported all and computed nothing, so that a fresh one costs no second of imports.
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()
