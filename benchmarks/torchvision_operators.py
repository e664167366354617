"""torchvision beside a torch that it was not built with."""

from __future__ import annotations

import torch


def declare() -> None:
    """Let torchvision be imported, by libraries that need none of its compiled operators.

    The registry's wheel is built for CUDA: beside a torch for CPUs its operators stay undeclared, and torchvision
    refuses to be imported without these two. Nothing here calls either, so their names are enough.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pass
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
