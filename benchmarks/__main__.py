"""Runs one of the benchmarks' commands; each is a module with `add_arguments(parser)` and `run(arguments) -> int`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import torch

COMMANDS = {
    "demo": "train on scikit-learn's digits: SGD, SWA and EMA side by side",
    "train": "train a network by SGD, with SWA, EMA and SWAG, with the settings of the SWA paper's authors",
    "methods": "compare SGD, SWA with a constant and a cyclical rate, EMA and SWAG on digits, over seeds",
    "plane": "draw the SWA paper's figure for digits: the loss on the plane of three models that SWA averages",
    "update": "time one update of the average against torch's, and against the machine's bandwidth",
    "swap": "time evaluating with the average, there and back, against the other libraries",
    "update_bn": "time a recomputation of BatchNorm statistics against torch's and fvcore's, on whole networks",
    "scaling": "time updates of models of more and more elements, tensors and averages",
    "step": "time what averaging adds to the steps of a training",
    "cold": "time imports, first updates, and updates after a tensor got other memory",
    "integrations": "time one update in each library that averages weights: its own, and fastswa's in its place",
    "shards": "check the arithmetic of an update past one GPU against counts on 2, 4 and 8 gloo processes",
    "all": "run all benchmarks of one device, and say which targets are met",
    "compare": "compare two folders of CSV files: which ratios differ by more than their percentiles?",
    "merge": "make one folder of CSV files of those of several runs: the middle one, and the widest intervals",
    "report": "draw the pictures and write the tables of the measurements from the committed CSV files",
    "ptx": "compile every Triton kernel for four GPU targets and check the machine code; needs no GPU",
    "wheel": "check the contents of dist/*.whl and run the tests against the installed wheel",
}


def main(arguments: Sequence[str]) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit status: 0 if everything that was promised holds; 2 if there is no such device.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        # The other commands' modules stay unimported: the demo alone needs matplotlib and scikit-learn.
        if name in arguments[:1]:
            module = import_module(f"benchmarks.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    if getattr(parsed, "device", None) == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available", file=sys.stderr)
        return 2
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
