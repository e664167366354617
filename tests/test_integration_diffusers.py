"""EMAModel against diffusers': the same numbers, states and folders that cross over, a training with accelerate."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.averages_apart import Apart, Operations, walk
from tests.numerics import assert_close_in_ulps

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
OPTIONS: dict[str, dict[str, Any]] = {
    "ratio": {"decay": 0.7},
    "ratio_bounds": {"decay": 0.7, "min_decay": 0.3, "update_after_step": 3},
    "foreach": {"decay": 0.7, "foreach": True},
    "warmup": {"decay": 0.9, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75},
    "warmup_bounds": {"decay": 0.9, "use_ema_warmup": True, "min_decay": 0.5, "update_after_step": 2, "foreach": True},
}
STATE = ["decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"]


@pytest.fixture(scope="module")
def classes(torchvision_imports: None) -> list[Any]:
    """Ours and diffusers'."""
    from diffusers.training_utils import EMAModel as Original

    from fastswa.integrations.diffusers import EMAModel

    return [EMAModel, Original]


def parameters_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)
    # The ready-made part of a LoRA, for example.
    model[2].requires_grad_(False)
    return list(model.parameters())


def step_through(parameters: list[nn.Parameter], ours: Any, theirs: Any, apart: Apart, steps: int) -> None:
    """Take random steps into both averages and compare each."""
    for _ in range(steps):
        walk(parameters)
        for ema in (ours, theirs):
            ema.step(iter(parameters))
        assert ours.cur_decay_value == theirs.cur_decay_value
        # The original rounds 1 - decay, the distance, their product and the sum: half a lerp's bound more.
        apart.step(parameters, 1 - theirs.cur_decay_value)
        apart.check(ours.shadow_params, theirs.shadow_params)
        for average, parameter in zip(ours.shadow_params, parameters, strict=True):
            assert parameter.requires_grad or torch.equal(average, parameter)


@DTYPES
@pytest.mark.parametrize("options", OPTIONS)
def test_each_step_equals_the_original(classes: list[Any], options: str, dtype: torch.dtype) -> None:
    parameters = parameters_of(dtype)
    ours, theirs = (each(parameters, **OPTIONS[options]) for each in classes)
    step_through(parameters, ours, theirs, Apart(parameters, dtype), 30)
    parameters[-1].requires_grad_(True)
    step_through(parameters, ours, theirs, Apart(parameters, dtype), 3)
    assert isinstance(ours, classes[1])


def test_float32_averages_of_a_bfloat16_model_equal_the_original(classes: list[Any]) -> None:
    parameters = parameters_of(torch.bfloat16)
    ours, theirs = (each(parameters, decay=0.9) for each in classes)
    for ema in (ours, theirs):
        ema.to(dtype=torch.float32)
    step_through(parameters, ours, theirs, Apart(parameters, torch.float32), 20)
    assert {average.dtype for average in ours.shadow_params} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_small_steps_add_up_in_half_precision(classes: list[Any], dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(2**15, dtype=dtype))
    ours, theirs = (each([parameter], decay=0.9999, use_ema_warmup=True, power=100) for each in classes)
    for ema in (ours, theirs):
        ema.step([parameter])
    nn.init.constant_(parameter, 2.0)
    for _ in range(100):
        for ema in (ours, theirs):
            ema.step([parameter])
    assert ours.cur_decay_value == 0.9999
    assert bool((theirs.shadow_params[0] == 1).all())
    # 2^15 independent elements. Rounding a step of s between neighbours a grid apart has the variance s (grid - s) at
    # most, the sum of 100 that of 100 s grids; five standard deviations of the mean.
    deviation = (100 * 1e-4 * torch.finfo(dtype).eps) ** 0.5 / 2**7.5
    mean = float(ours.shadow_params[0].double().mean())
    assert mean == pytest.approx(2 - 0.9999**100, abs=5 * deviation)


def test_a_bfloat16_average_goes_to_one_of_its_two_neighbours(classes: list[Any]) -> None:
    parameter = nn.Parameter(torch.randn(4096).bfloat16())
    ema = classes[0]([parameter], decay=0.9, min_decay=0.9)
    ema.step([parameter])
    before = ema.shadow_params[0].double()
    walk([parameter])
    ema.step([parameter])
    exact = before + (1 - 0.9) * (parameter.detach().double() - before)
    # A whole ulp, and the float32 arithmetic's 1.5 * 2^-16 of one.
    assert_close_in_ulps(ema.shadow_params[0], exact, 1 + 2**-15, before, parameter.detach())


@DTYPES
@pytest.mark.parametrize("first", [0, 1], ids=["ours_first", "theirs_first"])
def test_a_state_crosses_over_in_mid_run(classes: list[Any], first: int, dtype: torch.dtype) -> None:
    parameters = parameters_of(dtype)
    saving, stays = (classes[first](parameters, **OPTIONS["warmup"]) for _ in range(2))
    for _ in range(5):
        walk(parameters)
        saving.step(parameters)
        stays.step(parameters)
    file = io.BytesIO()
    torch.save(saving.state_dict(), file)
    file.seek(0)
    resumed = classes[1 - first](parameters_of(dtype))
    resumed.step(parameters)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert sorted(resumed.state_dict()) == sorted([*STATE, "shadow_params"])
    assert all(resumed.state_dict()[name] == stays.state_dict()[name] for name in STATE)
    assert all(map(torch.equal, resumed.shadow_params, stays.shadow_params))
    step_through(parameters, resumed, stays, Apart(parameters, dtype), 6)


def test_a_resumed_run_rounds_as_an_uninterrupted_one(classes: list[Any]) -> None:
    parameters = parameters_of(torch.bfloat16)
    whole, part = (classes[0](parameters, decay=0.99) for _ in range(2))
    for step in range(10):
        walk(parameters)
        whole.step(parameters)
        part.step(parameters)
        if step == 4:
            state, part = part.state_dict(), classes[0](parameters)
            part.load_state_dict(state)
    assert all(map(torch.equal, whole.shadow_params, part.shadow_params))


def unet() -> Any:
    from diffusers import UNet2DModel

    pictures = {"sample_size": 8, "in_channels": 1, "out_channels": 1}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    return UNet2DModel(**pictures, **blocks, block_out_channels=(4,), norm_num_groups=2, add_attention=False)


@pytest.mark.parametrize("first", [0, 1], ids=["ours_first", "theirs_first"])
def test_a_folder_crosses_over(classes: list[Any], first: int, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    model = unet()
    options = {**OPTIONS["warmup_bounds"], "model_cls": UNet2DModel, "model_config": model.config}
    saving = classes[first](model.parameters(), **options)
    for _ in range(4):
        walk(model.parameters())
        saving.step(model.parameters())
    saving.save_pretrained(tmp_path)
    read = classes[1 - first].from_pretrained(tmp_path, UNet2DModel)
    assert type(read) is classes[1 - first]
    assert {name: read.state_dict()[name] for name in STATE} == {name: saving.state_dict()[name] for name in STATE}
    assert all(map(torch.equal, read.shadow_params, saving.shadow_params))
    step_through(list(model.parameters()), read, saving, Apart(model.parameters(), torch.float32), 3)


def test_the_averages_are_lent_and_the_parameters_come_back(classes: list[Any]) -> None:
    parameters = parameters_of()
    ema = classes[0](parameters, decay=0.5)
    held = ema.shadow_params[0]
    walk(parameters)
    ema.step(parameters)
    assert held is ema.shadow_params[0]
    before = [parameter.detach().clone() for parameter in parameters]
    ema.store(parameters)
    ema.copy_to(parameters)
    assert all(map(torch.equal, parameters, ema.shadow_params))
    ema.restore(parameters)
    assert all(map(torch.equal, parameters, before))
    with pytest.raises(RuntimeError, match="nothing is stored"):
        ema.restore(parameters)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))], ids=["copy", "pickle"])
def test_copies_and_replaced_tensors_are_followed(classes: list[Any], again: Any) -> None:
    parameters = parameters_of()
    ours, theirs = (each(parameters, **OPTIONS["foreach"]) for each in classes)
    apart = Apart(parameters, torch.float32)
    step_through(parameters, ours, theirs, apart, 3)
    left = [average.clone() for average in ours.shadow_params]
    other = again(ours)
    step_through(parameters, other, theirs, apart, 3)
    assert all(map(torch.equal, left, ours.shadow_params))
    parameters[0].data = parameters[0].data.clone()
    other.shadow_params[1] = other.shadow_params[1].clone()
    step_through(parameters, other, theirs, apart, 3)
    other.to(device="cpu", dtype=torch.float64)
    other.step(parameters)
    assert {average.dtype for average in other.shadow_params} == {torch.float64}


def test_a_module_in_place_of_parameters_is_deprecated_as_there(classes: list[Any]) -> None:
    model = nn.Linear(3, 3)
    with pytest.warns(FutureWarning):
        ours, theirs = (each(model, decay=0.5) for each in classes)
    walk(model.parameters())
    for ema in (ours, theirs):
        with pytest.warns(FutureWarning):
            ema.step(model)
    assert ours.use_ema_warmup
    assert all(map(torch.equal, ours.shadow_params, theirs.shadow_params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.5}, "Decay must be between"),
        ({"power": "2"}, "Invalid power"),
        ({"shadow_params": [torch.ones(2)]}, "1 saved averages for 6 averages"),
        ({"shadow_params": [torch.ones(1)] * 6}, "number 0 of the saved averages"),
    ],
)
def test_a_bad_state_loses_nothing(classes: list[Any], change: dict[str, Any], message: str) -> None:
    parameters = parameters_of()
    ema = classes[0](parameters, decay=0.9)
    ema.step(parameters)
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict({**before, "min_decay": 0.5, "optimization_step": 7, **change})
    assert all(ema.state_dict()[name] == before[name] for name in STATE)
    assert all(map(torch.equal, ema.shadow_params, before["shadow_params"]))


def test_other_lists_lose_nothing(classes: list[Any]) -> None:
    parameters = parameters_of()
    ema = classes[0](parameters, decay=0.9)
    ema.store(parameters)
    before = [average.clone() for average in ema.shadow_params]
    for bad in (parameters[:-1], [parameters[0][:, :1], *parameters[1:]]):
        values = [tensor.detach().clone() for tensor in bad]
        for call in (ema.step, ema.copy_to, ema.store, ema.restore):
            with pytest.raises(ValueError, match=r"averages|shape"):
                call(bad)
        assert all(map(torch.equal, values, bad))
    assert ema.optimization_step == 0
    assert all(map(torch.equal, before, ema.shadow_params))
    ema.restore(parameters)


def test_what_can_not_be_fused_goes_through_the_original(classes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = parameters_of()
    ours, theirs = (each(parameters, decay=0.9) for each in classes)
    # As DeepSpeed marks what it keeps in parts.
    parameters[0].ds_id = 0
    called = []
    step = classes[1].step
    monkeypatch.setattr(classes[1], "step", lambda ema, tensors: called.append(ema) or step(ema, tensors))
    walk(parameters)
    ours.step(parameters)
    theirs.step(parameters)
    assert called == [ours, theirs]
    assert all(map(torch.equal, ours.shadow_params, theirs.shadow_params))


def test_an_update_neither_loops_nor_reads_the_device(classes: list[Any]) -> None:
    parameters = [nn.Parameter(torch.randn(100)) for _ in range(50)]
    counts = []
    for each in classes:
        ema = each(parameters)
        for _ in range(3):
            ema.step(parameters)
        with Operations() as operations:
            ema.step(parameters)
        assert "_local_scalar_dense" not in operations.names
        counts.append(len(operations.names))
    assert counts[0] <= 3
    assert counts[1] >= 150


def train(each: Any, folder: Path, steps: int, resume: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The loop of diffusers' unconditional example, on random pictures; accelerate saves and loads the average."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler

    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True)
    model, noise_scheduler = unet(), DDPMScheduler(num_train_timesteps=10)
    ema = each(model.parameters(), decay=0.9, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(ema)
    if resume:
        accelerator.load_state(str(folder))
    for step in range(ema.optimization_step, steps):
        torch.manual_seed(step)
        clean, noise = torch.randn(2, 4, 1, 8, 8)
        times = torch.randint(0, 10, (4,))
        predicted = model(noise_scheduler.add_noise(clean, noise, times), times).sample
        accelerator.backward(nn.functional.mse_loss(predicted, noise))
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
    accelerator.save_state(str(folder), safe_serialization=False)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    ema.copy_to(model.parameters())
    return weights, list(model.parameters())


@pytest.mark.parametrize("first", [0, 1], ids=["ours_first", "theirs_first"])
def test_a_training_with_accelerate_is_resumed_by_either(classes: list[Any], first: int, tmp_path: Path) -> None:
    weights, averages = train(classes[1], tmp_path / "whole", 12, resume=False)
    train(classes[first], tmp_path / "halves", 6, resume=False)
    resumed, theirs = train(classes[1 - first], tmp_path / "halves", 12, resume=True)
    # Training itself is the same, bit for bit; the averages differ by 4 ulp a step at most, of weights below 2.
    assert all(map(torch.equal, weights, resumed))
    torch.testing.assert_close(averages, theirs, rtol=0, atol=12 * 4 * 2**-23)
