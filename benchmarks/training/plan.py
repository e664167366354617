"""The learning-rate plan of the SWA authors' script: high for half of the time, a linear descent, then constant."""

from __future__ import annotations

from benchmarks.training.options import Options

SGD_FINAL = 0.01
"""The last rate of a run without SWA, as a share of the first."""


def rate(options: Options, epoch: int) -> float:
    r"""The learning rate of an epoch, outside SWA's cycles.

    With :math:`t = (e - 1) / E`, where E is the epoch at which SWA starts, or the number of epochs without SWA, the
    rate is the first one until :math:`t = 1/2`, goes down linearly until :math:`t = 9/10`, and stays there: at SWA's
    rate, or without SWA at a hundredth of the first.

    Args:
        options: of the run.
        epoch: e, counted from 1.

    Example:
        >>> options = Options.of("cifar100", "vgg16", swa=True)
        >>> [round(rate(options, epoch), 4) for epoch in (1, 81, 82, 114, 145, 146, 300)]
        [0.05, 0.05, 0.0497, 0.0298, 0.0106, 0.01, 0.01]

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, section 4.1; their
        script's function of the epoch.
    """
    t = (epoch - 1) / (options.swa_start if options.swa else options.epochs)
    final = options.swa_lr if options.swa else SGD_FINAL * options.lr_init
    descended = min(max((t - 0.5) / 0.4, 0.0), 1.0)
    return (1 - descended) * options.lr_init + descended * final


def averaging(options: Options, epoch: int) -> bool:
    """Whether models of an epoch are averaged.

    Args:
        options: of the run.
        epoch: counted from 1.
    """
    return options.swa and epoch >= options.swa_start


def cyclical(options: Options, epoch: int) -> bool:
    """Whether an epoch's rate goes in cycles.

    Args:
        options: of the run.
        epoch: counted from 1.
    """
    return averaging(options, epoch) and options.swa_schedule == "cyclical"


def evaluated(options: Options, epoch: int) -> bool:
    """Whether the models are tested after an epoch.

    Args:
        options: of the run.
        epoch: counted from 1.
    """
    return epoch in (1, options.epochs) or epoch % options.eval_every == 0
