"""WeightAveragingCallback in the Trainer's own loop, on small models: against torch's average, resumed, refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastswa import EMA, SWA, WeightAverages
from fastswa.rules import Rule
from tests.averages_apart import Apart

pytestmark = pytest.mark.usefixtures("torchvision_imports", "one_thread")
STEPS, EVERY = 12, 3


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost models of this size more than they do, and much more where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(1)
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=8, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2))


def examples(model: nn.Module, count: int, seed: int = 2) -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 50, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row if hasattr(model, "lm_head") else row[0] % 2} for row in tokens]


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Any:
    """Dropout is on; two batches of four a step, four steps an epoch, three epochs."""
    from transformers import Trainer, TrainingArguments

    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 0.01,
        "save_steps": EVERY,
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "logging_steps": 5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    data = {"train_dataset": examples(model, 32), "eval_dataset": options.pop("eval_dataset", examples(model, 8, 3))}
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    return Trainer(model, arguments, callbacks=list(callbacks), **data)


def averaging(rules: Any = None, **options: Any) -> Any:
    from fastswa.integrations.transformers import WeightAveragingCallback

    return WeightAveragingCallback(rules or EMA(0.8), **options)


def recorder() -> Any:
    """Torch's average of the same weights, and what the model holds at each event."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.average: Any = None
            self.apart: Any = None
            self.raw: list[list[Tensor]] = []
            self.averages: dict[int, list[Tensor]] = {}
            self.evaluated: list[tuple[int, list[Tensor]]] = []

        def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            if self.average is None:
                self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
                self.apart = Apart(model.parameters(), torch.float32)
            self.average.update_parameters(model)
            self.apart.step(model.parameters(), 0.2 if self.raw else 1.0)
            self.raw.append(copies(model.parameters()))
            self.averages[state.global_step + 1] = copies(self.average.parameters())

        def on_evaluate(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            self.evaluated.append((state.global_step, copies(model.parameters())))

    return Recorder()


def copies(tensors: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def same(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def saved(folder: Path, step: int, like: nn.Module) -> list[Tensor]:
    """The parameters in a checkpoint's model file."""
    return copies(type(like).from_pretrained(folder / f"checkpoint-{step}").parameters())


@pytest.mark.parametrize("make", [bert, gpt2])
def test_evaluation_checkpoints_and_the_end_are_torchs_average(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, record, callback = make(), recorder(), averaging()
    trainer(model, tmp_path, record, callback).train()
    assert [step for step, _ in record.evaluated] == list(range(EVERY, STEPS + 1, EVERY))
    for step, held in record.evaluated:
        record.apart.check(held, record.averages[step])
        assert same(held, saved(tmp_path, step, model))
    record.apart.check(copies(model.parameters()), record.averages[STEPS])
    assert callback.averages.n_averaged == {"average": STEPS}
    plain, alone = recorder(), make()
    trainer(alone, tmp_path / "plain", plain, save_strategy="no").train()
    # The training itself is untouched, bit for bit.
    assert len(plain.raw) == len(record.raw) == STEPS
    assert all(map(same, plain.raw, record.raw))


SEVERAL = {"fast": EMA(0.5), "slow": SWA(start=4, every=2)}


@pytest.mark.parametrize(
    ("make", "rules", "options"),
    [(bert, EMA(0.8), {}), (gpt2, SEVERAL, {"used": "slow"}), (bert, SEVERAL, {"used": "fast", "exclude": "*.bias"})],
    ids=["bert", "several_of_tied", "part"],
)
@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make: Callable[[], nn.Module], rules: Any, options: dict[str, Any], step: int, tmp_path: Path
) -> None:
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{step}")):
        model, callback, record = make(), averaging(rules, **options), recorder()
        run = trainer(model, tmp_path, record, callback)
        run.train(resume_from_checkpoint=resume)
        runs.append((model, callback.averages, record, run))
    (whole, averages, record, run), (model, resumed, again, second) = runs
    assert all(map(same, record.raw[step:], again.raw))
    assert same(whole.state_dict().values(), model.state_dict().values())
    assert averages.n_averaged == resumed.n_averaged
    for name, sets in averages.state_dict()["averages"].items():
        assert same(sets[0].values(), resumed.state_dict()["averages"][name][0].values())
    losses = [[each["eval_loss"] for each in one.state.log_history if "eval_loss" in each] for one in (run, second)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("strategy", ["steps", "best", "epoch"])
def test_the_best_model_is_an_average(strategy: str, tmp_path: Path) -> None:
    model, record, callback = bert(), recorder(), averaging()
    # Large enough that the loss goes up again.
    options = {"save_strategy": strategy, "eval_strategy": "epoch" if strategy == "epoch" else "steps"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.1}
    run = trainer(model, tmp_path, record, callback, **options, **best)
    run.train()
    losses = {each["step"]: each["eval_loss"] for each in run.state.log_history if "eval_loss" in each}
    step = min(losses, key=lambda step: losses[step])
    record.apart.check(copies(model.parameters()), record.averages[step])
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[step], rel=1e-6)
    weights = callback.averages.weights()
    record.apart.check([weights[name].detach() for name, _ in model.named_parameters()], copies(record.averages[STEPS]))


def test_all_evaluation_sets_see_the_average(tmp_path: Path) -> None:
    model, record, callback = bert(), recorder(), averaging()
    sets = {"one": examples(model, 4, 5), "other": examples(model, 4, 6)}
    trainer(model, tmp_path, record, callback, eval_dataset=sets, save_strategy="no", num_train_epochs=1).train()
    assert [step for step, _ in record.evaluated] == [3, 3, 4, 4]
    for step, held in record.evaluated:
        record.apart.check(held, record.averages[step])


def test_an_average_that_holds_no_model_is_not_used(tmp_path: Path) -> None:
    counts = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model, record, callback = bert(), recorder(), averaging(EMA(0.9, start=STEPS - 1), device="cpu")
        run = trainer(model, tmp_path, record, callback, max_steps=STEPS - 1, eval_on_start=True)
        run.train(resume_from_checkpoint=resume)
        assert all(same(held, record.raw[-1]) for step, held in record.evaluated if step == STEPS - 1)
        assert same(model.parameters(), record.raw[-1])
        counts.append(callback.averages.state_dict()["counters"])
    assert counts == [{"step": STEPS - 1, "n_averaged": {"average": 0}}] * 2


def test_skipped_steps_do_not_count() -> None:
    callback, model = averaging(), nn.Linear(2, 2)
    callback.averages = WeightAverages(model, EMA(0.8))
    for skipped in (False, True, False):
        callback.on_optimizer_step(None, None, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
    assert callback.averages.n_averaged == {"average": 2}


def test_a_checkpoint_is_found_where_it_went(tmp_path: Path) -> None:
    trainer(bert(), tmp_path / "first", averaging(), max_steps=3).train()
    checkpoint = tmp_path / "first" / "checkpoint-3"

    def resume(folder: Path, **options: Any) -> Any:
        callback = averaging(**options)
        trainer(bert(), tmp_path / "second", callback, max_steps=4, save_strategy="no").train(
            resume_from_checkpoint=str(folder)
        )
        return callback.averages.n_averaged["average"]

    assert resume(checkpoint) == 4
    moved = Path(shutil.move(checkpoint, tmp_path / "moved"))
    with pytest.raises(ValueError, match=r"no averages\.pt of the checkpoint's averages in .*name its folder"):
        resume(moved)
    assert resume(moved, resume_from_checkpoint=str(moved)) == 4
    # Another run's file is none of this checkpoint's.
    trainer(bert(), tmp_path / "second", averaging(), max_steps=3).train()
    with pytest.raises(ValueError, match="no averages"):
        resume(moved)
    with pytest.raises(ValueError, match="rule of 'average' is EMA"):
        resume(moved, rules=SWA(), resume_from_checkpoint=str(moved))


def test_a_checkpoint_without_averages_begins_them(tmp_path: Path) -> None:
    trainer(bert(), tmp_path, max_steps=3).train()
    callback = averaging()
    run = trainer(bert(), tmp_path, callback, max_steps=6, save_only_model=True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.averages.n_averaged == {"average": 3}
    # It can't be resumed from.
    assert not (tmp_path / "checkpoint-6" / "averages.pt").exists()


def test_the_weights_come_back_after_an_interrupted_evaluation(tmp_path: Path) -> None:
    model, record, callback = bert(), recorder(), averaging()

    class Broken(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            raise KeyboardInterrupt

    run = trainer(model, tmp_path, record, callback, eval_dataset=Broken(examples(model, 8)))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    record.apart.check(copies(model.parameters()), record.averages[EVERY])
    run.args.max_steps, run.args.eval_strategy, run.eval_dataset = 1, "no", None
    before: list[Tensor] = []
    run.model.register_forward_pre_hook(lambda *_: None if before else before.extend(copies(model.parameters())))
    run.train()
    assert same(before, record.raw[EVERY - 1])


def test_refusals(tmp_path: Path) -> None:
    for rules, options, message in (
        ({"a": SWA(), "b": SWA()}, {}, "used must name the average"),
        (SWA(), {"used": "slow"}, "used is 'slow'"),
        ({}, {}, "at least one rule"),
    ):
        with pytest.raises(ValueError, match=message):
            averaging_of(rules, **options)
    with pytest.raises(TypeError, match="must be a Rule"):
        averaging_of({"a": 0.9})
    with pytest.raises(RuntimeError, match=r"call Trainer\.train"):
        averaging().on_optimizer_step(None, None, None)
    for name in ("deepspeed", "fsdp"):
        args = SimpleNamespace(**{name: "full_shard"})
        with pytest.raises(RuntimeError, match=f"can't average under {name}"):
            averaging().on_train_begin(args, None, None, model=nn.Linear(2, 2))
    trainer(bert(), tmp_path, averaging(), max_steps=3).train()
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, eval_on_start=False)
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-3" / "trainer_state.json"))
    callback, other = averaging(), gpt2()
    before = copies(other.parameters())
    with pytest.raises(ValueError, match="the checkpoint's model is another"):
        callback.on_train_begin(args, state, None, model=other)
    assert same(before, other.parameters())
    assert callback.averages is None


def averaging_of(rules: Rule | dict[str, Any], **options: Any) -> Any:
    from fastswa.integrations.transformers import WeightAveragingCallback

    return WeightAveragingCallback(rules, **options)
