"""ultralytics' ModelEMA with the update fused."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from functools import partial

from torch import Tensor, nn

from fastswa.module_follower import ModuleFollower
from fastswa.module_update import divide
from fastswa.pairing import Pair, pair_names
from fastswa.warmups import ExponentialWarmup


class ModelEMA:
    r"""An exponential moving average of a model, in place of `ultralytics.utils.torch_utils.ModelEMA`.

    .. math:: a \leftarrow a + (1 - d(n)) (p - a), \qquad d(n) = d \left(1 - e^{-n / \tau}\right)

    for the n-th update, counted from 1, of everything in the model's `state_dict`. The same arguments, methods and
    attributes as ultralytics 8.4; it is no subclass, so that this module imports nothing of ultralytics. `ema` is a
    plain module in evaluation mode, whose copies the trainer saves as ever. The trainer takes the class by name:

        ultralytics.engine.trainer.ModelEMA = fastswa.integrations.ultralytics.ModelEMA

    before `model.train(...)`, for new runs and resumed ones. On several GPUs ultralytics starts processes that see the
    line only in a module that they import: that of a trainer class of one's own, `model.train(trainer=...)`.

    It differs on purpose: a tied weight moves once an update, not once for each of its names. Integer buffers, such as
    BatchNorm's counters, are copied, where ultralytics leaves them at their first values. Tensors that are replaced or
    moved are followed, where ultralytics goes on with those of the first update. A tensor that the model has in another
    shape is refused before anything is written or counted. The object can be pickled.

    The average's tensors move into common buffers at the first update: they keep their identity, but a view of one that
    was made before follows no longer.

    Args:
        model: the model, as it is or wrapped by DistributedDataParallel or torch.compile; copied.
        decay: d in [0, 1].
        tau: updates after which 63 % of the decay are reached, above 0.
        updates: how many there were before.

    Raises:
        ValueError: a value out of its range, or NaN.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> average = ModelEMA(model)
        >>> average.update(model)
        >>> prediction = average.ema(torch.randn(8, 4))

    References:
        ultralytics 8.4.190, ultralytics/utils/torch_utils.py.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, tau: float = 2000, updates: int = 0) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.decay: Callable[[int], float] = partial(_decay, decay, ExponentialWarmup(tau))
        """The decay of an update by its number; may be set."""
        self.updates = updates
        """How many updates there were; may be set."""
        self.enabled = True
        """Whether `update` and `update_attr` do anything; may be set."""
        self.ema = deepcopy(unwrapped(model)).eval()
        """The average."""
        if hasattr(self.ema, "teacher_model"):
            # A model under distillation holds its teacher, which does not change.
            self.ema.teacher_model = None  # type: ignore[assignment]
        self.ema.requires_grad_(False)
        self._follower = ModuleFollower()

    def update(self, model: nn.Module) -> None:
        """Take a model's present weights into the average; call it after `optimizer.step()`.

        Args:
            model: of which the average was made, as it is or wrapped.

        Raises:
            ValueError: a tensor that the model has not, or has in another shape; nothing has been written or counted.
            TypeError: a tensor that can't be averaged; nothing has been written or counted.
        """
        if self.enabled:
            self._follower.lerp_(self.ema, unwrapped(model), 1 - self.decay(self.updates + 1), _sort)
            self.updates += 1

    def update_attr(self, model: nn.Module, include: Collection[str] = (), exclude: Collection[str] = ()) -> None:
        """Give the average a model's attributes that are no tensors or modules and not private.

        Args:
            model: of which the average was made, as it is or wrapped.
            include: names; all if left out.
            exclude: names.
        """
        if self.enabled:
            for name, value in vars(unwrapped(model)).items():
                if (not include or name in include) and name not in exclude and not name.startswith("_"):
                    setattr(self.ema, name, value)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and DistributedDataParallel put around it.

    Args:
        model: as it is or wrapped, in any order.
    """
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model


def _decay(target: float, warmup: ExponentialWarmup, update: int) -> float:
    return float(warmup.decay(update, target))


def _sort(averaged: nn.Module, model: nn.Module) -> tuple[list[Pair], list[Pair]]:
    return divide(pair_names(_saved(averaged), _saved(model)))


def _saved(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state_dict: parameters and buffers themselves, not aliases of them."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
