"""AveragedModel: torch.optim.swa_utils.AveragedModel with the update fused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from fastswa import backends
from fastswa.module_update import FlatModule, ModuleUpdate, check_values, refusal, sort_pairs
from fastswa.pairing import pair_buffers, pair_parameters
from fastswa.rules import Rule, recognise


class AveragedModel(swa_utils.AveragedModel):
    r"""A running average of a model's weights, held in a copy of the model.

    .. math:: a_0 = p_0, \qquad a_n = a_{n-1} + w(n) (p_n - a_{n-1})

    with :math:`w(n) = 1 / (n + 1)` (SWA) unless an averaging function says otherwise. It takes the place of torch's
    class: the same arguments in the same order, the same `state_dict`, the same numbers; `isinstance` holds. All
    tensors are updated together, in one kernel launch on a GPU, and no update waits for the device.

    It differs from torch on purpose where torch goes wrong unseen: a model with fewer parameters or with shapes that
    merely broadcast is refused, integer buffers are copied instead of averaged, and a low-precision model may have its
    average in float32.

    The average's tensors are moved into common buffers, so that small ones are reached together: a tensor of the
    average keeps its identity, but a view of it that was made before follows no longer.
    A function of the user's own as `avg_fn` or `multi_avg_fn` runs as it does in torch; torch's `get_*_avg_fn`
    functions and fastswa's rules run fused.

    Args:
        model: the model to average; copied.
        device: where the average is kept; the model's devices if left out.
        avg_fn: (averaged, current, num_averaged) -> the new average, called for each tensor.
        multi_avg_fn: (averaged list, current list, num_averaged), updates in place. Rules such as `EMA(0.999)` fit.
        use_buffers: average floating buffers too. If not, all buffers are copied at each update.
        dtype: of the average, such as torch.float32 for a bfloat16 model; the model's dtypes if left out.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        module: a ready module of the model's architecture to hold the average, instead of a copy of the model.
        capturable: keep the counter beside the average and count there from the start, for CUDA graphs.

    Raises:
        AssertionError: both avg_fn and multi_avg_fn, as in torch.
        TypeError: a function as device; a rule that WeightAverages alone serves, such as one with `every=2`.
        ValueError: an unknown backend or dtype; a parameter on the meta device or not initialised; a `module` that does
            not match. The parameter is named.
        RuntimeError: a model that can't be copied, with the attribute at fault; a backend that can't run here.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(3):
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     ema.update_parameters(model)
        >>> int(ema.n_averaged)
        3

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, Algorithm 1.
    """

    # Class attributes, so that a subclass that sets torch's attributes itself and skips __init__ has these too.
    backend: str = "auto"
    capturable: bool = False
    _averaged: FlatModule | None = None
    _update: ModuleUpdate | None = None
    _recognised: tuple[object, Rule | None] = (None, recognise(None))
    _counted: tuple[Tensor | None, int, int] = (None, 0, 0)
    _captured: bool = False
    _in_graph: bool = False

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | str | None = None,
        avg_fn: Callable[..., Tensor] | None = None,
        multi_avg_fn: Callable[..., None] | None = None,
        use_buffers: bool = False,
        *,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        module: nn.Module | None = None,
        capturable: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        if callable(device):
            raise TypeError(
                f"device is a function ({device!r}); the order is (model, device, avg_fn, multi_avg_fn, use_buffers): "
                "pass it as multi_avg_fn=... or avg_fn=..."
            )
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError("avg_fn and multi_avg_fn were both given; give one")
        _check_rule(multi_avg_fn if avg_fn is None else avg_fn)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype, got {dtype}")
        check_values(model, "the model")
        if module is not None:
            sort_pairs(module, model, use_buffers)
        tensors = (*model.parameters(), *model.buffers())
        for place in {tensor.device for tensor in tensors} if device is None else {torch.device(device)}:
            backends.choose(backend, place)
        self.module = _copy(model) if module is None else module
        if device is not None:
            self.module.to(device)
        if dtype is not None:
            # Not Module.to(dtype), which would drop the imaginary part of complex tensors.
            cast = partial(_cast, dtype=dtype)
            self.module._apply(cast)  # type: ignore[no-untyped-call]
        if refusal(self.module) is None:
            self._averaged = FlatModule(self.module)
        if capturable and device is None:
            device = next(self.module.parameters()).device
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.capturable = capturable
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers
        self.backend = backend

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged module.

        Args:
            *args: of the module.
            **kwargs: of the module.

        Returns:
            What the module returns.
        """
        if torch.is_grad_enabled():
            self._in_graph = True
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's present weights into the average.

        The first call copies. Inside a CUDA graph's capture the counter `n_averaged` must be on the GPU (`device=`);
        the graph then reads and advances it there, and so does every later update.

        Args:
            model: the model that the average was made of, as it is or wrapped by DistributedDataParallel or
                torch.compile. Its tensors may have moved or been replaced since the last update.

        Raises:
            ValueError: parameters or buffers that are missing, left over or of another shape; the first is named, and
                nothing has been written.
            TypeError: a dtype that can't be averaged.
            RuntimeError: in a capture, when the update was not prepared before it or the counter is on the CPU.
        """
        rule = self._rule()
        if rule is None:
            self._check_order(model)
            super().update_parameters(model)
            return
        update = self._prepare(model)
        if update is None:
            super().update_parameters(model)
            return
        counter = self.n_averaged
        if self.capturable or (update.on_gpu and _capturing()):
            self._captured = True
        n = 0 if self._captured else self._count(counter)
        if self._captured or (n == 0 and counter.is_cuda):
            # The first update too, so that a capture after it finds this form of the kernel compiled.
            update.lerp_(_device_weight(rule, counter))
        else:
            update.lerp_(1.0 if n == 0 else rule.weight(n))
        counter.add_(1)
        if self._in_graph:
            update.invalidate_graphs()
            self._in_graph = False
        # Past Module.__setattr__, which would look for a parameter first.
        self.__dict__["_counted"] = (counter, _version(counter), n + 1)

    def _count(self, counter: Tensor) -> int:
        """The host's own count, unless somebody else wrote the counter (load_state_dict, a reset): then it is read."""
        known, version, count = self._counted
        return count if known is counter and version == _version(counter) else int(counter)

    def _rule(self) -> Rule | None:
        function = self.avg_fn if self.multi_avg_fn is None else self.multi_avg_fn
        if self._recognised[0] is not function:
            _check_rule(function)
            self._recognised = (function, recognise(function))
        return self._recognised[1]

    def _prepare(self, model: nn.Module) -> ModuleUpdate | None:
        averaged, update = self._averaged, self._update
        if averaged is not None and averaged.holds(self.module):
            if update is not None and update.fits(averaged, model, self.use_buffers, self.backend):
                return update
        else:
            averaged = None
        if _capturing():
            raise RuntimeError("update_parameters was not prepared: call it once with this model before the capture")
        reason = refusal(self.module, model)
        if reason is None:
            if averaged is None:
                # Before anything moves; otherwise ModuleUpdate refuses as well.
                sort_pairs(self.module, model, self.use_buffers)
            # What is prepared serves later calls too, which may be outside inference mode.
            with torch.inference_mode(False), torch.no_grad():
                self._averaged = averaged or FlatModule(self.module)
                self._update = ModuleUpdate(self._averaged, model, self.use_buffers, self.backend)
            return self._update
        if self.backend != "auto":
            raise RuntimeError(f"backend={self.backend!r} can't update this model: {reason}; use backend='auto'")
        backends.say_once(f"torch's own loop updates the average: {reason}")
        self._check_order(model)
        return None

    def _check_order(self, model: nn.Module) -> None:
        """Refuse what torch's loop, which pairs by order and broadcasts, would get wrong unseen."""
        pairs = (*pair_parameters(self.module, model), *pair_buffers(self.module, model))
        for pair, theirs in zip(pairs, (*model.parameters(), *model.buffers()), strict=True):
            if pair.source is not theirs:
                raise ValueError(f"the model has {pair.name!r} in another place; an own avg_fn needs equal order")

    def __getstate__(self) -> dict[str, Any]:
        # The prepared update holds addresses, which mean nothing in a copy or in another process.
        hidden = ("_in_graph", "_averaged", "_update", "_counted", "_recognised", "_captured")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}


def _check_rule(function: object) -> None:
    """Refuse a rule that would be averaged otherwise than it says: this class averages whenever it is called."""
    reason = function.refusal() if isinstance(function, Rule) else None
    if reason is not None:
        raise TypeError(reason)


def _device_weight(rule: Rule, counter: Tensor) -> Tensor:
    """The next weight, computed from the counter on its device."""
    if not counter.is_cuda and _capturing():
        raise RuntimeError(
            "n_averaged is on the CPU, so a captured graph would repeat one weight; "
            "make the AveragedModel with capturable=True, or move it with .to()"
        )
    weight: Tensor = rule.copy_weights(counter)[0]
    return weight


def _version(counter: Tensor) -> int:
    # Tensors made in inference mode count no versions; a write to such a counter by somebody else goes unnoticed.
    return 0 if counter.is_inference() else counter._version


def _capturing() -> bool:
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(initialised and torch.cuda.is_current_stream_capturing())


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _copy(model: nn.Module) -> nn.Module:
    try:
        return deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"the model can't be deep-copied{_blame(model)}: {error}. "
            "Average it by WeightAverages, which needs no copy, or pass module=, a second instance of the same "
            "architecture, to hold the average"
        ) from error


def _blame(model: nn.Module) -> str:
    """The first attribute of the model that can't be deep-copied by itself, in words."""
    for path, part in model.named_modules():
        own = {**part.__dict__, **part._parameters, **part._buffers}
        for name, value in own.items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                deepcopy(value)
            except Exception:
                return f" because of {f'{path}.{name}' if path else name!r} ({type(value).__name__})"
    return ""
