"""Trains a network as the authors of the SWA paper do: with SGD, and with averages of its weights if asked for.

The defaults are the authors' settings for the network and dataset. After each epoch a line of a table is shown, a row
is added to log.csv in the run's folder, and now and then checkpoint.pt is replaced there; --resume goes on from it, on
a CPU to the same numbers bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch

from benchmarks.networks import TRAINED
from benchmarks.training import checkpoint, log, loop
from benchmarks.training.datasets import NAMES
from benchmarks.training.options import SCHEDULES, Options, disagreement

RUNS = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    add = parser.add_argument
    add("--dataset", choices=NAMES, help="default: digits")
    add("--data-path", type=Path, help="folder of CIFAR's files, or the one that it lies in")
    add("--model", choices=TRAINED, help="default: digits, or preresnet164 for CIFAR")
    add("--epochs", type=int, help="default: the network's budget; with --swa, 1.5 budgets")
    add("--batch-size", type=int, help="default: 128; 16 for digits")
    add("--lr-init", type=float, help="the first learning rate; default: the network's")
    add("--momentum", type=float, help="default: 0.9")
    add("--weight-decay", "--wd", type=float, help="of all parameters; default: the network's")
    add("--swa", action="store_true", default=None, help="average models of the run's end")
    add("--swa-start", type=int, help="first epoch whose models are averaged, from 1; default: the network's")
    add("--swa-lr", type=float, help="learning rate meanwhile, the highest of a cycle; default: the network's")
    add("--swa-schedule", choices=SCHEDULES, help="a model an epoch, or one at each cycle's lowest rate")
    add("--swa-lr-min", type=float, help="lowest rate of a cycle; default: a fifth of --swa-lr")
    add("--cycle", type=int, help="length of a cycle in iterations; default: an epoch")
    add("--ema-decay", type=float, help="average all iterations exponentially too; default: not")
    add("--swag", action="store_true", default=None, help="test a SWAG of the models that SWA takes")
    add("--swag-rank", type=int, help="deviations that it keeps; default: 20")
    add("--swag-samples", type=int, help="networks of its ensemble; default: 30")
    add("--eval-every", type=int, help="epochs between tests; default: 5; 1 for digits")
    add("--seed", type=int, help="of weights, batches and dropout, and of the digits' split; default: 0")
    add("--amp", action="store_true", default=None, help="bfloat16 where torch.autocast finds it safe")
    add("--double", action="store_true", default=None, help="float64: the same numbers on every CPU, as printed")
    add("--channels-last", action="store_true", default=None, help="memory format of weights and images")
    add("--resume", type=Path, help="a run's folder or checkpoint; its options hold, others are refused")
    add("--output", type=Path, help="folder of log and checkpoint; default: in runs/, named after the options")
    add("--save-every", type=int, default=1, help="epochs between checkpoints (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu")


def run(arguments: argparse.Namespace) -> int:
    """Train.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if the loss was not finite any more; 2 for options or files that can't be; 130 after an interrupt.
    """
    # The images always have the same size, so that the fastest convolutions are worth looking for.
    torch.backends.cudnn.benchmark = True
    try:
        options, output, state = prepared(arguments)
        dataset = loop.images_for(options, arguments.data_path)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{output}: {' '.join(f'{field.name}={getattr(options, field.name)}' for field in fields(options))}")
    try:
        done = loop.train(
            *(options, dataset),
            device=arguments.device,
            output=output,
            save_every=arguments.save_every,
            resume=state,
            progress=True,
        )
    except FloatingPointError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; python -m benchmarks train --resume {output} goes on", file=sys.stderr)
        return 130
    for name, score in done.scores.items():
        print(f"{name}: {score.accuracy:.2f} % of the test set, loss {score.loss:.4f}")
    print(f"log in {output / log.NAME}, weights and averages in {output / checkpoint.NAME}")
    return 0


def prepared(arguments: argparse.Namespace) -> tuple[Options, Path, dict[str, object] | None]:
    """What to train, where to write it, and what to go on from.

    Args:
        arguments: of the command.

    Returns:
        The options, the run's folder, and the checkpoint's content with `--resume`.

    Raises:
        ValueError: options that can't be, that a checkpoint has otherwise, or a folder that holds another run.
        FileNotFoundError: no checkpoint where one should be.
    """
    if arguments.save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {arguments.save_every}")
    names = (field.name for field in fields(Options))
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.resume is None:
        options = Options.of(**{"dataset": "digits", **given})
        output = arguments.output or RUNS / folder_name(options)
        if (output / checkpoint.NAME).exists():
            raise ValueError(f"{output} holds a run already: --resume {output} goes on, --output takes another folder")
        return options, output, None
    path = checkpoint.find(arguments.resume)
    state = checkpoint.load(path, arguments.device)
    other = disagreement(state["options"], given)
    if other:
        raise ValueError(f"{path}: {other}; leave the option out, or begin another run")
    if arguments.output is not None and arguments.output.resolve() != path.parent.resolve():
        raise ValueError(f"output is {path.parent} in the checkpoint and {arguments.output} here; leave it out")
    return Options(**state["options"]), path.parent, state


def folder_name(options: Options) -> str:
    """A run's folder, if no other is given.

    Args:
        options: of the run.

    Example:
        >>> folder_name(Options.of("cifar10", "vgg16", swa=True, seed=3))
        'cifar10-vgg16-swa-constant-300-epochs-seed-3'
    """
    method = f"swa-{options.swa_schedule}" if options.swa else "sgd"
    return f"{options.dataset}-{options.model}-{method}-{options.epochs}-epochs-seed-{options.seed}"
