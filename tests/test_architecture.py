"""The boundaries that keep the library small and its kernels usable alone."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import fastswa
import fastswa_kernels

ROOT = Path(__file__).parents[1]
LIBRARY = Path(fastswa.__file__).parent
KERNELS = Path(fastswa_kernels.__file__).parent

# Imports run downwards only: a module may import from the layers below its own.
LAYERS = [
    {"__main__"},
    {
        "integrations",
        "integrations.diffusers",
        "integrations.ema_pytorch",
        "integrations.ignite",
        "integrations.lightning",
        "integrations.timm",
        "integrations.torch_ema",
        "integrations.transformers",
        "integrations.ultralytics",
    },
    {"__init__"},
    {"acceleration", "ranks", "synthesis", "plane", "ensemble", "checkpoints"},
    {"checkpoints.average"},
    {"checkpoints.plan"},
    {"checkpoints.files", "checkpoints.output", "checkpoints.float64_mean"},
    {"checkpoints.state_dicts"},
    {"plane.weight_plane", "plane.drawing"},
    {"plane.evaluation", "plane.labels", "plane.levels"},
    {"plane.geometry", "plane.grid", "plane.weights"},
    {"averaged_model", "weight_averages", "swag", "batch_norm", "schedulers"},
    {"swag_state"},
    {"agreement", "average_state"},
    {"averaging"},
    {"average_sets", "counters", "swap", "execution"},
    {"followed", "offload", "unprepared", "overlap", "list_update", "module_follower"},
    {"module_update", "batch_norm.update", "averaging_functions", "profiles"},
    {"batch_norm.engines", "batch_norm.sweeps", "lawa", "power_ema"},
    {"batch_norm.calls", "batch_norm.confidence", "batch_norm.group"},
    {"batch_norm.layers", "batch_norm.moments", "batch_norm.batches", "batch_norm.report"},
    {"rules", "pairing", "watch"},
    {"backends", "warmups"},
    {"prepared", "torch_combine"},
    {"torch_multi_update", "triton_multi_update", "torch_moments", "staging"},
    {"torch_update"},
    {"stretches", "torch_lerp", "updates"},
    {"flat", "shards"},
]


def imports(path: Path) -> set[str]:
    """The names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names.update(
                f"{prefix}.{alias.name}" if node.module in (None, "fastswa") else prefix for alias in node.names
            )
    return names


def module_name(path: Path) -> str:
    """A library file's module, without the package's own name; a sub-package's __init__ counts as the sub-package."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def test_imports_run_downwards() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    files = sorted(LIBRARY.rglob("*.py"))
    assert {module_name(path) for path in files} == set(level), "a new module needs a layer"
    for path in files:
        for name in imports(path):
            if name.startswith("fastswa."):
                imported = name.removeprefix("fastswa.")
                # The longest module in the name; what the package itself re-exports counts as the package.
                modules = [module for module in level if f"{imported}.".startswith(f"{module}.")]
                target = level[max(modules, key=len, default="__init__")]
                assert level[module_name(path)] < target, f"{path.name} imports {name}"
            assert name != "triton", f"{path.name} imports triton"


def test_the_kernels_know_only_torch_triton_and_numpy() -> None:
    allowed = {"torch", "triton", "numpy", *sys.stdlib_module_names}
    for path in KERNELS.rglob("*.py"):
        for name in imports(path):
            assert name.startswith(".") or name.split(".")[0] in allowed, f"{path.name} imports {name}"
        assert "torch.library" not in path.read_text()
        assert "torch.ops" not in path.read_text()


@pytest.mark.parametrize("hidden", ["triton", "fastswa_kernels"])
def test_imports_without_triton_and_without_the_kernels(hidden: str) -> None:
    module = "fastswa_kernels" if hidden == "triton" else "fastswa"
    program = f"""
import sys
sys.modules[{hidden!r}] = None
import {module}
assert not any(name.split(".")[0] == "triton" and sys.modules[name] for name in list(sys.modules))
if {module!r} == "fastswa_kernels":
    import torch
    average = [torch.zeros(2)]
    fastswa_kernels.reference.lerp_(average, [torch.ones(2)], 0.5)
    assert average[0].tolist() == [0.5, 0.5]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_model_on_the_cpu_is_averaged_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, fastswa
model = torch.nn.Linear(2, 2)
average = fastswa.AveragedModel(model)
for _ in range(2):
    average.update_parameters(model)
assert torch.equal(average.module.weight, model.weight)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_kernels_is_no_package() -> None:
    # From a checkout it would shadow the PyPI package of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_are_short() -> None:
    for path in (*LIBRARY.rglob("*.py"), *KERNELS.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 300, path.name


def test_both_packages_are_typed() -> None:
    assert (LIBRARY / "py.typed").exists()
    assert (KERNELS / "py.typed").exists()


def test_the_pins_hold_every_direct_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for requirement in (*project["dependencies"], *(name for names in extras.values() for name in names)):
        assert requirement.split(">=")[0] in pins, requirement


MODULES = [
    *(module.name for module in pkgutil.walk_packages([str(LIBRARY)], "fastswa.") if "__main__" not in module.name),
    *(module.name for module in pkgutil.walk_packages([str(KERNELS)], "fastswa_kernels.")),
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("torchvision_imports")
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    names = {**vars(module), **{public: getattr(fastswa, public) for public in fastswa.__all__}, "torch": torch}
    finder = doctest.DocTestFinder(recurse=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in finder.find(module, name, extraglobs=names):
        for step in example.examples:
            # The kernels' examples name a GPU; here the interpreter runs them.
            step.source = step.source.replace('device="cuda"', 'device="cpu"')
        runner.run(example)
    assert runner.failures == 0


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("torchvision_imports")
def test_everything_public_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name or not callable(value):
            continue
        if key.endswith("_kernel"):
            continue
        assert value.__doc__, f"{name}.{key} has no docstring"


def test_the_environment_report() -> None:
    program = [sys.executable, "-m", "fastswa", "env"]
    output = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert f"fastswa: {fastswa.__version__}" in output
    assert f"torch: {torch.__version__}" in output
    assert "averages updated by torch" in output
