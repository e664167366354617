"""The public names of fastswa_kernels with their signatures as text, and which version a change of them asks for."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import fastswa_kernels

ROOT = Path(__file__).parents[1]
INTERFACES = ROOT / "kernels" / "interface"
"""One file a minor version; that of a released version is never edited."""

Interface = Mapping[str, str]
"""A public name -> its signature."""


def present() -> Interface:
    """The interface as it is now."""
    return dict(_described(fastswa_kernels, ""))


def text_of(interface: Interface) -> str:
    """An interface as a file holds it: a line for each name.

    Args:
        interface: to be written.
    """
    return "".join(f"{name}{signature}\n" for name, signature in sorted(interface.items()))


def read(path: Path) -> Interface:
    """An interface of a file.

    Args:
        path: of the file.
    """
    return dict(re.findall(r"^([\w.]+)(.*)$", path.read_text(), re.MULTILINE))


def committed() -> dict[tuple[int, int], Interface]:
    """The interface of each minor version, the oldest first."""
    found = {tuple(map(int, path.stem.split("."))): read(path) for path in INTERFACES.glob("*.txt")}
    return {(version[0], version[1]): found[version] for version in sorted(found)}


def change(old: Interface, new: Interface) -> str:
    """What kind of change leads from one interface to another.

    Args:
        old: of one version.
        new: of the next.

    Returns:
        "major" where code written for the old one may break, "minor" where names or parameters with defaults were
        added, "none" where they are equal.
    """
    if any(name not in new or not _accepts(new[name], signature) for name, signature in old.items()):
        return "major"
    return "none" if dict(old) == dict(new) else "minor"


def _described(owner: object, prefix: str) -> Iterator[tuple[str, str]]:
    for name in getattr(owner, "__all__", None) or [key for key in vars(owner) if not key.startswith("_")]:
        value, path = getattr(owner, name), prefix + name
        if inspect.ismodule(value):
            yield from _described(value, f"{path}.")
        elif inspect.isclass(value):
            yield path, _signature(value).removesuffix(" -> None")
            yield from _described(value, f"{path}.")
        elif isinstance(value, property):
            yield path, ": " + _signature(value.fget).rpartition(" -> ")[2]
        elif callable(value):
            yield path, _signature(value)


def _signature(value: object) -> str:
    assert callable(value)
    # Annotations are text here, and some versions of Python print them in quotes.
    return str(inspect.signature(value)).replace("'", "").replace("(self, ", "(").replace("(self)", "()")


def _accepts(new: str, old: str) -> bool:
    """Whether every call that an old signature accepts means the same with a new one."""
    if not (new.startswith("(") and old.startswith("(")):
        return new == old
    (positional, keywords, result), (old_positional, old_keywords, old_result) = _parameters(new), _parameters(old)
    added = positional[len(old_positional) :] + [each for each in keywords if each not in old_keywords]
    return (
        positional[: len(old_positional)] == old_positional
        and all(each in keywords for each in old_keywords)
        and all(" = " in each for each in added)
        and result == old_result
    )


def _parameters(signature: str) -> tuple[list[str], list[str], str]:
    """Positional parameters and keyword-only ones, each with annotation and default, and the result's annotation."""
    (function,) = ast.parse(f"def function{signature}: ...").body
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults

    def shown(argument: ast.arg, default: ast.expr | None) -> str:
        return ast.unparse(argument) + ("" if default is None else f" = {ast.unparse(default)}")

    positional = [shown(*pair) for pair in zip(arguments.args, defaults, strict=True)]
    keywords = [shown(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return positional, keywords, "" if function.returns is None else ast.unparse(function.returns)
