"""torch.optim.swa_utils made to hand out fastswa's averages, for code whose imports can't be changed."""

from __future__ import annotations

import copyreg
import sys
import threading
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim import swa_utils

from fastswa.averaged_model import AveragedModel
from fastswa.batch_norm import update_bn

Namespace = dict[str, Any]

_TorchAveragedModel = swa_utils.AveragedModel

# Held while names are replaced, and while it is decided whether they are.
_lock = threading.RLock()
_open: list[Acceleration] = []


class Acceleration:
    """What `accelerate_torch` gave: a context manager that ends what it began, and a list of what is replaced.

    Args:
        replacement: the names that are replaced now.
    """

    def __init__(self, replacement: Replacement) -> None:
        self._replacement = replacement

    @property
    def patched(self) -> list[str]:
        """The names that were replaced, as "module.name", in the order in which they were found."""
        return list(self._replacement.patched)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            if self in _open:
                _open.remove(self)
                if not _open:
                    self._replacement.undo()

    def __repr__(self) -> str:
        return f"{'Acceleration' if self in _open else 'ended Acceleration'} of {', '.join(self.patched)}"


def accelerate_torch() -> Acceleration:
    """Make torch.optim.swa_utils hand out fastswa's AveragedModel and update_bn, in the whole process.

    Modules that imported these names before (Lightning does) get them too. Lasts until `restore_torch`, or as a context
    manager until the last of all contexts ends; a call while it lasts changes nothing. torch's `get_*_avg_fn` functions
    stay as they are, since fastswa's AveragedModel recognises what they return.

    Not reached: objects and subclasses that exist already, and names kept elsewhere than in a module (as a default
    argument, in a class). Meanwhile `isinstance(x, AveragedModel)` in such a module is False for an `x` that torch's
    class made before. Subclasses made meanwhile are and stay subclasses of fastswa's class. Other processes, a
    DataLoader's workers too, are reached only where they are forked.

    Returns:
        A context manager; `.patched` lists what was replaced.

    Example:
        >>> with accelerate_torch() as acceleration:
        ...     average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(4, 2))
        >>> isinstance(average, AveragedModel)
        True
        >>> acceleration.patched[0]
        'torch.optim.swa_utils.AveragedModel'
        >>> torch.optim.swa_utils.AveragedModel is AveragedModel
        False
    """
    with _lock:
        acceleration = Acceleration(_open[0]._replacement if _open else Replacement())
        _open.append(acceleration)
        return acceleration


def restore_torch() -> None:
    """End every acceleration: torch.optim.swa_utils hands out torch's own again; nothing happens where it does.

    Modules that took a name from torch.optim.swa_utils meanwhile get torch's, too. Averages made meanwhile stay
    fastswa's, and modules that import from fastswa keep what they have.

    Example:
        >>> _ = accelerate_torch()
        >>> restore_torch()
        >>> torch.optim.swa_utils.AveragedModel is AveragedModel
        False
    """
    with _lock:
        if _open:
            _open[0]._replacement.undo()
            _open.clear()


class Replacement:
    """torch's names replaced, from when this is made until `undo`.

    The names are taken out of torch.optim.swa_utils, so that its `__getattr__` is asked for them and sees by whom:
    afterwards a module that took a name there is told from one that imported the same object from fastswa.
    """

    def __init__(self) -> None:
        self._replaced = {"AveragedModel": _TorchAveragedModel, "update_bn": swa_utils.update_bn}
        self._ours: Namespace = {"AveragedModel": AveragedModel, "update_bn": update_bn}
        # Who took a name in torch meanwhile, with the names that it had from fastswa before.
        self._takers: dict[int, tuple[Namespace, set[str]]] = {}
        self._written: list[tuple[Namespace, str]] = []
        self.patched: list[str] = []
        """The names that were replaced, as "module.name"."""
        # While its name in torch leads elsewhere, pickle would refuse what torch's own class made.
        copyreg.pickle(_TorchAveragedModel, _reduce)
        vars(swa_utils)["__getattr__"] = self._hand_out
        for name in self._replaced:
            del vars(swa_utils)[name]
            self.patched.append(f"{swa_utils.__name__}.{name}")
        for module, namespace in _namespaces():
            for name, value in list(namespace.items()):
                for key, torch_own in self._replaced.items():
                    if value is torch_own:
                        namespace[name] = self._ours[key]
                        self._written.append((namespace, name))
                        self.patched.append(f"{module}.{name}")

    def _hand_out(self, name: str) -> Any:
        if name not in self._ours:
            raise AttributeError(f"module {swa_utils.__name__!r} has no attribute {name!r}")
        taker = sys._getframe(1).f_globals
        if id(taker) not in self._takers:
            self._takers[id(taker)] = taker, {name for name, value in list(taker.items()) if self._is_ours(value)}
        return self._ours[name]

    def undo(self) -> None:
        """Put torch's own back wherever fastswa's were put or taken."""
        for name, value in self._replaced.items():
            # Unless somebody put another object there meanwhile.
            vars(swa_utils).setdefault(name, value)
        del vars(swa_utils)["__getattr__"]
        copyreg.dispatch_table.pop(_TorchAveragedModel, None)
        taken = [(taker, name) for taker, kept in self._takers.values() for name in list(taker) if name not in kept]
        for namespace, name in (*self._written, *taken):
            for key, ours in self._ours.items():
                if namespace.get(name) is ours:
                    namespace[name] = self._replaced[key]

    def _is_ours(self, value: object) -> bool:
        return any(value is ours for ours in self._ours.values())


def _namespaces() -> list[tuple[str, Namespace]]:
    """The globals of all modules but fastswa's own, which build on torch's class."""
    modules = list(sys.modules.items())
    return [
        (name, vars(module))
        for name, module in modules
        if isinstance(module, ModuleType) and name.partition(".")[0] != "fastswa"
    ]


def _reduce(average: nn.Module) -> tuple[Any, ...]:
    return _new, (), average.__getstate__()  # type: ignore[no-untyped-call]


def _new() -> nn.Module:
    """An empty instance of torch's class, for pickle to fill."""
    return _TorchAveragedModel.__new__(_TorchAveragedModel)
