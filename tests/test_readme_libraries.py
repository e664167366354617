"""README's section on other libraries: its imports, its extras, its code."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any

import pytest
from torch.optim import swa_utils

import fastswa
from fastswa import integrations
from tests.code_blocks import ROOT

pytestmark = pytest.mark.usefixtures("torchvision_imports")
SECTION = re.search(r"^## Under the library you use\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1]  # type: ignore[index]
IMPORTS = dict(re.findall(r"`from fastswa\.integrations\.(\w+) import (\w+)`", SECTION))
NAMES = {
    "diffusers": "diffusers.training_utils.EMAModel",
    "ema_pytorch": "ema_pytorch.EMA",
    "ignite": "ignite.handlers.EMAHandler",
    "timm": "timm.utils.ModelEmaV3",
    "torch_ema": "torch_ema.ExponentialMovingAverage",
}
"""Classes whose name a user finds again."""


def test_each_integration_has_a_line_that_imports() -> None:
    # Of the package that is tested, which may be an installed wheel's.
    assert set(IMPORTS) == {module.name for module in iter_modules(integrations.__path__)}
    for name, imported in IMPORTS.items():
        ours = getattr(import_module(f"fastswa.integrations.{name}"), imported)
        assert ours.__module__ == f"fastswa.integrations.{name}"
        assert f"{name}: {imported}" in str(import_module("fastswa.integrations").__doc__)
        if name in NAMES:
            module, _, theirs = NAMES[name].rpartition(".")
            assert imported == theirs
            assert hasattr(import_module(module), theirs)


def test_the_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (sentence,) = re.findall(
        r"^`pip install 'fastswa\[(\w+)\]'` brings the library along; so do (.*?)\.", SECTION, re.M | re.S
    )
    named = {sentence[0], *re.findall(r"`(\w+)`", sentence[1])}
    assert named == set(IMPORTS) & set(extras)


def test_the_block_accelerates_torch_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.findall(r"^```python\n(.*?)^```$", SECTION, re.M | re.S)[0]
    seen: list[Any] = []
    trainer = SimpleNamespace(fit=lambda model: seen.append(swa_utils.AveragedModel))
    exec(block, {"trainer": trainer, "model": None})
    assert seen == [fastswa.AveragedModel]
    assert swa_utils.AveragedModel is not fastswa.AveragedModel
    assert "torch.optim.swa_utils.AveragedModel" in capsys.readouterr().out
