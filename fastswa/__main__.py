"""`python -m fastswa env`: what an issue report should say about the machine."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastswa
from fastswa import backends


def environment() -> dict[str, str]:
    """The versions and devices that decide which code runs, by name."""
    facts = {"fastswa": fastswa.__version__, "torch": torch.__version__}
    facts |= {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("triton", "numpy"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "unknown"
        facts[str(device)] = f"{name}, averages updated by {backends.choose('auto', device)}"
    return facts


def main() -> None:
    """Print the environment, a fact a line."""
    parser = argparse.ArgumentParser(prog="python -m fastswa", description=__doc__)
    parser.add_argument("command", choices=["env"])
    parser.parse_args()
    for name, fact in environment().items():
        print(f"{name}: {fact}")


if __name__ == "__main__":
    main()
