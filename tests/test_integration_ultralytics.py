"""ModelEMA against ultralytics': the same numbers, checkpoints that cross over, its own trainer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastswa.integrations.ultralytics import ModelEMA, unwrapped
from tests.averages_apart import Apart, Operations, walk

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(scope="module")
def library(torchvision_imports: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """ultralytics' trainer and ModelEMA, with its settings in a folder of its own and without the network."""
    options = copy.copy(vars(torch._tensor_str.PRINT_OPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_VERBOSE", "false")
        import ultralytics.engine.trainer
        from ultralytics.utils import torch_utils

        yield SimpleNamespace(trainer=ultralytics.engine.trainer, utils=torch_utils, YOLO=ultralytics.YOLO)
    # It sets how all tensors are printed.
    vars(torch._tensor_str.PRINT_OPTS).update(options)


@pytest.fixture
def original(library: Any) -> Any:
    """The library's own class."""
    return library.utils.ModelEMA


class Network(nn.Module):
    """With everything that a state_dict may hold or leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.last = nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.names = {0: "a"}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Network().to(dtype)


def floats(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


@DTYPES
@pytest.mark.parametrize(
    "options",
    [{}, {"decay": 0.9, "tau": 3}, {"decay": 0.5, "tau": 20, "updates": 30}, {"decay": 1.0, "tau": 1}],
    ids=str,
)
def test_each_step_equals_the_original(original: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = network(dtype)
    ours, theirs = ModelEMA(model, **options), original(model, **options)
    apart = Apart(floats(model), dtype)
    for step in range(40):
        walk([*model.parameters(), *model.buffers()])
        # A wrapped model, and an average that is off for a while.
        wrapped = model if step % 2 else nn.DataParallel(model)
        ours.enabled = theirs.enabled = step not in (5, 6)
        ours.update(wrapped)
        theirs.update(wrapped)
        assert ours.updates == theirs.updates
        assert ours.decay(step) == theirs.decay(step)
        if ours.enabled:
            apart.step(floats(model), 1 - ours.decay(ours.updates))
        apart.check(floats(ours.ema), floats(theirs.ema))
        # A buffer that no state_dict holds stays.
        assert not ours.ema.cache.any()
    # Documented: the original leaves integers as they were.
    assert (int(ours.ema.norm.num_batches_tracked), int(theirs.ema.norm.num_batches_tracked)) == (40, 0)
    assert not ours.ema.training
    assert not any(parameter.requires_grad for parameter in ours.ema.parameters())


def test_a_decay_of_ones_own_and_updates_that_are_set(original: Any) -> None:
    model = network()
    ours, theirs = ModelEMA(model), original(model)
    apart = Apart(floats(model), torch.float32)
    for average in (ours, theirs):
        average.decay = lambda update: 0.5 + 0.01 * update
        average.updates = 7
    for _ in range(10):
        walk(model.parameters())
        ours.update(model)
        theirs.update(model)
        apart.step(floats(model), 1 - ours.decay(ours.updates))
        apart.check(floats(ours.ema), floats(theirs.ema))
    assert ours.updates == theirs.updates == 17


def test_attributes_follow_alike(original: Any) -> None:
    model = network()
    averages = [ModelEMA(model), original(model)]
    model.names, model.stride, model._hidden, model.nc = {1: "b"}, torch.ones(2), 1, 4
    for average in averages:
        average.update_attr(nn.DataParallel(model), include=["names", "stride", "_hidden"], exclude=("stride",))
        assert average.ema.names == {1: "b"}
        assert not any(hasattr(average.ema, name) for name in ("stride", "_hidden", "nc"))
        average.update_attr(model, exclude=("training",))
        assert (average.ema.nc, average.ema.training) == (4, False)
        assert torch.equal(average.ema.stride, model.stride)


def test_wrappers_and_teachers(original: Any, library: Any) -> None:
    model = network()
    for wrapped in (model, nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))):
        assert unwrapped(wrapped) is library.utils.unwrap_model(wrapped) is model
    model.teacher_model = nn.Linear(2, 2)
    ours, theirs = ModelEMA(model, decay=0.9, tau=1), original(model, decay=0.9, tau=1)
    walk(model.parameters())
    ours.update(model)
    theirs.update(model)
    assert ours.ema.teacher_model is theirs.ema.teacher_model is None
    apart = Apart(floats(ours.ema), torch.float32)
    apart.step(floats(theirs.ema), 1.0)
    apart.check(floats(ours.ema), floats(theirs.ema))


def test_tied_weights_move_once(original: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    start = model[0].weight.detach().clone()
    averages = [ModelEMA(model), original(model)]
    with torch.no_grad():
        model[0].weight += 1
    moved = []
    for average in averages:
        average.decay = lambda update: 0.9
        average.update(model)
        moved.append(float((average.ema[0].weight - start).mean()))
        assert average.ema[0].weight is average.ema[1].weight
    # Documented: the original moves them by 0.1 twice, of what is left the second time.
    assert moved == pytest.approx([0.1, 0.19], abs=1e-6)


def test_replaced_and_moved_tensors_are_followed(original: Any) -> None:
    model = network()
    ours = ModelEMA(model)
    ours.decay = lambda update: 0.5
    exact = [tensor.clone() for tensor in floats(model)]
    for step in range(6):
        walk(model.parameters())
        if step == 1:
            model.linear.weight = nn.Parameter(model.linear.weight.detach().clone())
        if step == 2:
            model.norm.running_mean.data = model.norm.running_mean.data.clone()
        if step == 3:
            ours.ema.load_state_dict(copy.deepcopy(ours.ema.state_dict()), assign=True)
        if step == 4:
            # As the library's validator does.
            with torch.inference_mode():
                ours.ema.float()
        if step == 5:
            ours.ema.half().float()
            exact = [tensor.half().float() for tensor in exact]
        ours.update(model)
        exact = [0.5 * (one + other) for one, other in zip(exact, floats(model), strict=True)]
        # A sum and a half: an ulp of numbers below 4, and as much of ours, halved at each step.
        torch.testing.assert_close(floats(ours.ema), exact, rtol=0, atol=4 * 2 * 2**-23 if step < 5 else 4 * 2**-10)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))], ids=["copy", "pickle"])
def test_a_copy_goes_on_alone(make: Callable[[ModelEMA], ModelEMA]) -> None:
    model = network()
    average = ModelEMA(model, decay=0.5, tau=1)
    for _ in range(2):
        walk(model.parameters())
        average.update(model)
    before = [tensor.clone() for tensor in floats(average.ema)]
    other = make(average)
    walk(model.parameters())
    other.update(model)
    assert all(map(torch.equal, before, floats(average.ema)))
    average.update(model)
    assert all(map(torch.equal, floats(other.ema), floats(average.ema)))
    assert not any(map(torch.equal, before[1:], floats(other.ema)[1:3]))


def test_refusals_lose_nothing() -> None:
    for options, message in (({"decay": 1.5}, "decay must be in"), ({"tau": 0}, "tau must be above 0")):
        with pytest.raises(ValueError, match=message):
            ModelEMA(network(), **options)
    model = network()
    average = ModelEMA(model)
    places = [tensor.data_ptr() for tensor in floats(average.ema)]
    with pytest.raises(ValueError, match=r"the model has no 'scale'"):
        average.update(nn.Linear(2, 2))
    assert (average.updates, [tensor.data_ptr() for tensor in floats(average.ema)]) == (0, places)
    average.update(model)
    before = [tensor.clone() for tensor in floats(average.ema)]
    walk(model.parameters())
    model.last = nn.Linear(5, 1)
    with pytest.raises(ValueError, match=r"'last.weight' has shape \(3, 5\) in the average but \(1, 5\)"):
        average.update(model)
    del model.last
    with pytest.raises(ValueError, match=r"the model has no 'last\.weight'"):
        average.update(model)
    assert average.updates == 1
    assert all(map(torch.equal, before, floats(average.ema)))


def test_no_update_reads_the_device() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(30)))
    average = ModelEMA(model)
    average.update(model)
    with Operations() as operations:
        average.update(model)
    # Gathered, then moved.
    assert len(operations.names) <= 2
    assert "_local_scalar_dense" not in operations.names


MODEL = """
nc: 2
scales: {n: [1.0, 0.25, 1024]}
backbone: [[-1, 1, Conv, [32, 3, 2]], [-1, 1, Conv, [64, 3, 2]]]
head: [[-1, 1, Classify, [nc]]]
"""


class StoppedError(Exception):
    """Ends a run in the middle."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen noisy pictures of two classes, and a small network's description."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for number, label in enumerate(("dark", "light")):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                noise = torch.randint(0, 128, (32, 32, 3), dtype=torch.uint8, generator=generator) + 127 * number
                Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    (root / "small-cls.yaml").write_text(MODEL)
    return root


@pytest.fixture
def train(library: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Trains by the library's trainer with a class of average; gives what it ended with and the last checkpoint."""

    def run(each: Any, name: str, stop: int | None = None, resume: Path | None = None) -> Any:
        monkeypatch.setattr(library.trainer, "ModelEMA", each)
        model = library.YOLO(str(resume or data / "small-cls.yaml"))
        found: dict[str, Any] = {}

        def saved(trainer: Any) -> None:
            assert type(trainer.ema) is each
            found.update(average=copy.deepcopy(trainer.ema.ema.state_dict()), updates=trainer.ema.updates)
            found.update(model=copy.deepcopy(trainer.model.state_dict()), last=trainer.last)
            if trainer.epoch + 1 == stop:
                raise StoppedError

        model.add_callback("on_model_save", saved)
        common = {"data": str(data), "device": "cpu", "workers": 0, "plots": False, "amp": False, "batch": 4}
        fresh = {"project": str(tmp_path), "name": name, "epochs": 3, "imgsz": 32, "warmup_epochs": 0, "lr0": 0.01}
        # Two steps of the optimizer an epoch; and no settings of torch that would outlast the run.
        fresh |= {"nbs": 4, "deterministic": False}
        with suppress(StoppedError):
            model.train(**common, **({"resume": True} if resume else fresh))
        return SimpleNamespace(**found)

    return run


def assert_same_run(ours: Any, theirs: Any) -> None:
    assert ours.updates == theirs.updates > 0
    assert all(map(torch.equal, ours.model.values(), theirs.model.values()))
    for name, tensor in ours.average.items():
        other = theirs.average[name]
        if tensor.is_floating_point():
            # Steps of both that round to 1.5 ulp each, and a weight to half an ulp each.
            bound = 4 * ours.updates * 2**-23 * max(1.0, float(other.abs().max()))
            assert float((tensor - other).abs().max()) <= bound, name
        else:
            assert torch.equal(tensor, ours.model[name])


def test_the_librarys_trainer(train: Callable[..., Any], original: Any) -> None:
    runs = [train(each, name) for each, name in ((ModelEMA, "ours"), (original, "theirs"))]
    assert_same_run(*runs)
    assert not torch.equal(runs[0].average["model.0.conv.weight"], runs[0].model["model.0.conv.weight"])


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_checkpoints_cross_over(train: Callable[..., Any], original: Any, first: str) -> None:
    interrupted = train(ModelEMA if first == "ours" else original, "first", stop=1)
    checkpoint = torch.load(interrupted.last, weights_only=False)
    assert checkpoint["updates"] == interrupted.updates
    for name, tensor in checkpoint["ema"].state_dict().items():
        assert torch.equal(tensor, interrupted.average[name].to(tensor.dtype))
    kept = interrupted.last.read_bytes()
    runs = []
    for each in (ModelEMA, original):
        interrupted.last.write_bytes(kept)
        runs.append(train(each, "second", resume=interrupted.last))
    assert runs[0].updates == 3 * interrupted.updates
    assert_same_run(*runs)
