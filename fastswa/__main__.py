"""`python -m fastswa env`: what an issue report should say about the machine; `average`: the mean of checkpoints."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

import fastswa
from fastswa import backends

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


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


def env() -> None:
    """Print the environment, a fact a line."""
    for name, fact in environment().items():
        print(f"{name}: {fact}")


def average(arguments: argparse.Namespace) -> None:
    """Write the mean of checkpoint files and say what it holds."""
    report = fastswa.average_checkpoints(
        arguments.checkpoints,
        arguments.output,
        weights=arguments.weights,
        key=arguments.key,
        dtype=DTYPES.get(arguments.dtype),
        progress=sys.stderr.isatty() and find_spec("tqdm") is not None,
    )
    count, size = len(report.averaged), f"{report.bytes / 1e6:.1f} MB in {report.seconds:.1f} s"
    print(f"{report.output}: mean of {len(report.weights)} checkpoints, {count} entries, {size}")
    if report.kept:
        print(f"taken from {arguments.checkpoints[-1]}, not averaged ({len(report.kept)}): {', '.join(report.kept)}")
    if report.not_finite:
        names = ", ".join(report.not_finite)
        print(f"warning: NaN or infinity in {len(report.not_finite)} of the means: {names}", file=sys.stderr)


def weights(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them, such as 1,1,2") from None


def command_line() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m fastswa", description="Weight averaging for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print what an issue report should say about the machine")
    options = commands.add_parser(
        "average",
        help="write the mean of checkpoint files",
        description="Write the mean of checkpoint files: summed in float64 in the order given, rounded once. Integers, "
        "bools and entries that are no tensors are the last checkpoint's. Files are read in pieces; nothing is "
        "written unless all of it can be.",
        epilog="examples: python -m fastswa average epoch8.pt epoch9.pt epoch10.pt -o swa.pt --key state_dict; "
        "python -m fastswa average runs/a runs/b -o soup.safetensors --weights 3,1 --dtype bf16",
    )
    options.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CKPT",
        help=".pt, .pth, .bin, .ckpt or .safetensors file, *.index.json of a sharded one, or a folder that holds one",
    )
    options.add_argument("-o", "--output", required=True, metavar="OUT", help=".pt or .safetensors; may be an input")
    options.add_argument(
        "--weights",
        type=weights,
        metavar="A,B,...",
        help="one for each checkpoint, divided by their sum; equal if left out (--weights=-1,2 to start with a minus)",
    )
    options.add_argument("--key", help="of the state dict in a torch file, such as state_dict or model.state_dict")
    options.add_argument("--dtype", choices=list(DTYPES), help="of the means; as in the last checkpoint if left out")
    return parser


def main() -> int:
    """Run a command.

    Returns:
        The process's exit code: 0, 2 for what the command can't do, or 130 where it was interrupted.
    """
    arguments = command_line().parse_args()
    try:
        if arguments.command == "average":
            average(arguments)
        else:
            env()
    except (OSError, ValueError, ImportError) as error:
        print(f"python -m fastswa {arguments.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m fastswa {arguments.command}: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
