"""Private fine-tuning in the trainer's loop: what a step is, what noise and draws do to it, what is refused."""

import functools
import json
import math
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, get_quantization_config

from posttrain import DPSFTConfig, DPSFTTrainer
from posttrain.adapters.allora import ALLoRAConfig
from posttrain.errors import ConfigError, DataError, DivergedError
from posttrain.mechanisms.row_gradients import RowGradients
from posttrain.models import tiny_model
from posttrain.privacy import accounting
from posttrain.privacy.step import PrivateStep
from posttrain.run import private
from posttrain.run.private_batches import UNITS
from posttrain.trainers.sft import dp_sft
from tests import clipped, runs, scored
from tests.runs import distance, entries

NOISELESS = dict(target_epsilon=math.inf, expected_batch_size=8)


def rows(count=8, people=None):
    made = scored.make_scored(count).remove_columns("reward")
    return made if people is None else made.add_column("person", [f"p{row % people}" for row in range(count)])


def build(folder, output_dir, data=None, peft_config=None, draws=None, eval_dataset=None, **settings):
    fields = runs.SETTINGS | dict(output_dir=str(output_dir), learning_rate=0.5, max_length=256) | NOISELESS
    fields |= dict(per_device_train_batch_size=8) | settings
    data = rows() if data is None else data
    given = dict(train_dataset=data, eval_dataset=eval_dataset, peft_config=peft_config or runs.lora())
    trainer = DPSFTTrainer(folder, args=DPSFTConfig(**fields), **given)
    trainer._private.draws = draws
    return trainer


def own_mean(model, row):
    """The loss of a row that is forwarded alone: the mean over its own tokens."""
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, labels[0, 1:], ignore_index=-100)


by_hand = functools.partial(clipped.by_hand, loss_of=own_mean, rate=0.5)


@pytest.mark.parametrize("clip_norm", [0.4, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_a_run_without_noise_is_plain_training_on_clipped_rows(clip_norm, tiny_folder, tmp_path):
    """Neutral (no noise, no clipping, a known plan): the mean over rows of their means."""
    plan = [[0, 3, 5], [1, 2, 4, 6, 7]]
    settings = dict(clip_norm=clip_norm, expected_batch_size=4, max_steps=2, per_device_train_batch_size=2)
    trainer = build(tiny_folder, tmp_path, draws=lambda step: plan[step], **settings)
    assert trainer.args.gradient_accumulation_steps == 4
    reference = build(tiny_folder, tmp_path / "b", **settings)
    expected = by_hand(reference, plan, clip_norm=clip_norm, expected=4)
    change, _ = runs.fit(trainer)
    assert distance(change, expected) < 1e-4
    assert all(value.any() for name, value in change.items() if "lora_B" in name)
    assert [entry["private/units"] for entry in entries(trainer)] == [3, 5]


def test_the_unit_is_a_person_where_a_column_says_so(tiny_folder, tmp_path):
    data, steps = rows(8, people=3), [[(0, 3, 6), (1, 4, 7)], [(2, 5)]]
    people = dict(privacy_unit_column="person", rows_per_unit=3, expected_batch_size=2, clip_norm=0.4)
    plan = [[0, 1], [2]]
    trainer = build(tiny_folder, tmp_path, data, draws=lambda step: plan[step], **people, per_device_train_batch_size=4)
    assert (trainer._plan.units, trainer.args.gradient_accumulation_steps) == (3, 3)
    reference = build(tiny_folder, tmp_path / "b", data, **people)
    expected = by_hand(reference, steps, clip_norm=0.4, expected=2)
    change, _ = runs.fit(trainer)
    assert distance(change, expected) < 1e-4
    # rows clipped for themselves, the known wrong variant, end elsewhere
    alone = build(tiny_folder, tmp_path / "c", data, **people)
    wrong = by_hand(alone, [[0, 3, 6, 1, 4, 7], [2, 5]], clip_norm=0.4, expected=2)
    assert distance(change, wrong) > 1e-2


@pytest.mark.parametrize("made", [1, 3])
def test_a_collator_whose_rows_nobody_can_tell_apart_is_refused(made, tiny_folder, tmp_path):
    own = build(tiny_folder, tmp_path / "own").data_collator

    def other(examples):
        batch = own(examples)
        return {name: torch.cat([value, value])[:made] for name, value in batch.items()} if len(examples) > 1 else batch

    args = DPSFTConfig(**runs.SETTINGS | dict(output_dir=str(tmp_path / "run")) | NOISELESS)
    with pytest.raises(ConfigError, match=f"data_collator makes {made} rows of 2"):
        DPSFTTrainer(tiny_folder, args, other, rows(), peft_config=runs.lora())


def test_a_loss_that_couples_rows_is_refused_at_construction(tiny_folder, tmp_path, monkeypatch):
    own = dp_sft.row_losses

    def over_all_tokens(logps, mask):
        return -torch.where(mask, logps, 0.0).sum(dim=1) / mask.sum()

    def by_a_little(logps, mask):
        return own(logps, mask) * (1 + 0.01 * len(logps))

    for coupled in (over_all_tokens, by_a_little):
        monkeypatch.setattr(dp_sft, "row_losses", coupled)
        with pytest.raises(ConfigError, match="the model or its loss couples rows"):
            build(tiny_folder, tmp_path)


@pytest.mark.slow
def test_a_step_without_rows_is_noise_alone_and_moves_nothing_without_it(tiny_folder, tmp_path):
    change, trainer = runs.fit(build(tiny_folder, tmp_path, draws=lambda step: [], expected_batch_size=4))
    assert trainer.state.global_step == 2 and not any(value.any() for value in change.values())
    assert [entry["loss"] for entry in entries(trainer)] == [0.0, 0.0]
    private = dict(target_epsilon=None, noise_multiplier=1.0, target_delta=1e-3)
    change, trainer = runs.fit(
        build(tiny_folder, tmp_path / "b", draws=lambda step: [], expected_batch_size=4, **private)
    )
    values = torch.cat([value.flatten() for value in change.values()]) / 0.5
    # two steps of noise of 1 / 4 on each value
    assert values.std().item() == pytest.approx(math.sqrt(2) / 4, rel=0.05)


def test_noise_differs_between_runs_of_one_seed_and_the_norm_that_is_logged_has_it(tiny_folder, tmp_path):
    private = dict(target_epsilon=None, noise_multiplier=2.0, target_delta=1e-3, clip_norm=0.1)
    changes, norms = [], []
    for name in ("a", "b"):
        change, trainer = runs.fit(build(tiny_folder, tmp_path / name, **private))
        changes.append(change)
        norms += [entry["grad_norm"] for entry in entries(trainer)]
        assert all(entry["privacy/epsilon"] > 0 for entry in entries(trainer))
    assert distance(*changes) > 0.5
    count = sum(value.numel() for value in changes[0].values())
    # sigma C sqrt(values) / L
    assert norms == pytest.approx([2.0 * 0.1 * math.sqrt(count) / 8] * 4, rel=0.1)
    assert len(set(norms)) == 4


def test_a_row_that_is_no_number_stops_nothing_and_tells_nothing(tiny_folder, tmp_path, monkeypatch):
    losses = dp_sft.row_losses

    def one_bad(logps, mask):
        found = losses(logps, mask)
        return torch.cat([found[:1] * math.nan, found[1:]]) if len(found) == 8 else found

    monkeypatch.setattr(dp_sft, "row_losses", one_bad)
    change, trainer = runs.fit(build(tiny_folder, tmp_path))
    assert all(torch.isfinite(value).all() for value in change.values())
    for entry in entries(trainer):
        assert entry["private/rows_not_finite"] == 1 and math.isfinite(entry["loss"])


@pytest.mark.slow
def test_an_exported_adapter_has_the_logits_of_the_model_that_was_trained(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, target_epsilon=None, noise_multiplier=0.3, target_delta=1e-3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.arange(10, 42).view(2, 16)
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=ids).logits
        theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")(input_ids=ids).logits
        with trainer.model.disable_adapter():
            base = trainer.model(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours)
    assert (ours - base).abs().max() > 1e-3


@pytest.mark.slow
def test_only_b_is_trained_where_a_is_frozen(tiny_folder, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), runs.lora())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    fields = (
        runs.SETTINGS | dict(output_dir=str(tmp_path), learning_rate=0.5, per_device_train_batch_size=8) | NOISELESS
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    trainer = DPSFTTrainer(model, DPSFTConfig(**fields), train_dataset=rows(), processing_class=tokenizer)
    change, _ = runs.fit(trainer)
    assert change and all("lora_B" in name and value.any() for name, value in change.items())


@pytest.mark.slow
def test_the_ledger_and_the_promise_lie_beside_the_run_and_no_draws_or_noise(tiny_folder, tmp_path):
    settings = dict(target_epsilon=None, noise_multiplier=1.0, target_delta=1e-3, save_strategy="steps", save_steps=1)
    settings |= dict(per_device_train_batch_size=2)
    trainer = build(tiny_folder, tmp_path, **settings)
    trainer.train()
    promise = json.loads((tmp_path / "posttrain_privacy.json").read_text())
    assert promise["steps"] == 2 and promise["epsilon"] == pytest.approx(trainer._private.ledger.spent())
    assert promise["epsilon"] == pytest.approx(trainer._plan.epsilon)
    lines = (tmp_path / "privacy_ledger.jsonl").read_text().splitlines()
    assert sum("step" in json.loads(line) and "session" not in json.loads(line) for line in lines) == 2
    # how many micro-batches a step has follows from the rows again
    resumed = build(tiny_folder, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    told = resumed.promise()
    assert (told.steps, told.thrown_away) == (2, 1) and told.epsilon > told.epsilon_of_weights


@pytest.mark.slow
def test_more_steps_than_the_noise_was_solved_for_are_refused(tiny_folder, tmp_path):
    pytest.importorskip("dp_accounting")
    settings = dict(target_epsilon=8.0, target_delta=1e-3, save_strategy="steps", save_steps=2, expected_batch_size=4)
    build(tiny_folder, tmp_path, **settings, max_steps=2).train()
    with pytest.raises(ConfigError, match="noise"):
        trainer = build(tiny_folder, tmp_path, **settings, max_steps=6)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.slow
def test_an_epoch_draws_each_unit_once_on_average(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, max_steps=-1, num_train_epochs=2, expected_batch_size=3)
    trainer.train()
    # three steps of 3 of 8 rows an epoch
    assert (trainer.state.global_step, trainer.state.epoch) == (6, 2.0)
    drawn = [batch[UNITS].numbers for batch in trainer.get_train_dataloader()]
    assert len(drawn) == 3 * trainer.args.gradient_accumulation_steps
    again = [batch[UNITS].numbers for batch in trainer.get_train_dataloader()]
    assert drawn != again, "no seed decides who is drawn"


def test_too_few_micro_batches_are_refused_with_the_number_needed(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="need 4 micro-batches of 2 rows on each of 1 processes. Set it to 4 or more"):
        build(tiny_folder, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    trainer = build(tiny_folder, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=5)
    assert len(trainer.get_train_dataloader()) == 5


def test_rows_that_max_length_leaves_nothing_of_are_no_units(tiny_folder, tmp_path):
    data = scored.beyond(3, 1.0, scored.make_scored(8)).remove_columns("reward")
    trainer = build(tiny_folder, tmp_path, data)
    assert trainer._plan.units == 8 == len(trainer.train_dataset)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (LoraConfig(r=2, target_modules="all-linear", use_dora=True), "use_dora of the adapter is True"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save of the adapter"),
        (LoraConfig(r=2, target_modules=["q_proj"], bias="all"), "the adapter's bias is 'all'"),
        (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "lora_bias of the adapter is True"),
        (LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]), "trainable_token_indices of the"),
        (ALLoRAConfig(r=2, target_modules=["q_proj"]), "the adapter is allora"),
    ],
)
def test_adapters_that_train_more_than_a_and_b_are_refused(adapter, said, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match=said):
        build(tiny_folder, tmp_path, peft_config=adapter)


def test_models_and_data_that_have_no_rows_apart_are_refused(tiny_folder, tmp_path):
    args = DPSFTConfig(**runs.SETTINGS | dict(output_dir=str(tmp_path / "run")) | NOISELESS)
    with pytest.raises(ConfigError, match="there is no LoRA to train"):
        DPSFTTrainer(tiny_folder, args=args, train_dataset=rows())
    with pytest.raises(ConfigError, match="train_dataset is a stream"):
        build(tiny_folder, tmp_path / "a", rows().to_iterable_dataset())
    with pytest.raises(DataError, match="no column person, which privacy_unit_column names"):
        build(tiny_folder, tmp_path / "b", privacy_unit_column="person")
    with pytest.raises(ConfigError, match="expected_batch_size is 9, and the training data has 8 units"):
        build(tiny_folder, tmp_path / "c", expected_batch_size=9)
    with pytest.raises(ConfigError, match="target_delta is 0.2, and the training data has 8 units"):
        build(tiny_folder, tmp_path / "d", target_epsilon=8.0, target_delta=0.2)
    with pytest.raises(ConfigError, match="compute_loss_func is given"):
        DPSFTTrainer(
            tiny_folder, args, train_dataset=rows(), peft_config=runs.lora(), compute_loss_func=lambda *given: 0
        )


@pytest.mark.slow
def test_an_auxiliary_loss_of_experts_is_refused(tmp_path, tokenizer):
    experts = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5)
    tiny_model("mixtral", **experts).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ConfigError, match=r"Set `router_aux_loss_coef: 0.0`"):
        build(str(tmp_path / "base"), tmp_path / "run", peft_config=adapter)
    change, _ = runs.fit(build(str(tmp_path / "base"), tmp_path / "run", peft_config=adapter, router_aux_loss_coef=0.0))
    assert any(value.any() for value in change.values())


def test_a_dead_adapter_is_found_though_noise_would_move_it(tiny_folder, tmp_path, monkeypatch):
    private = dict(target_epsilon=None, noise_multiplier=1.0, target_delta=1e-3)
    gradients = RowGradients.take

    def dead(self):
        found = gradients(self)
        for name in [name for name in found if "lora_B" in name][:1]:
            found[name].zero_()
        return found

    trainer = build(tiny_folder, tmp_path, **private, gradient_checkpointing=True)
    monkeypatch.setattr(RowGradients, "take", dead)
    said = r"1 of \d+ adapter tensors get no gradient of made-up rows"
    with pytest.raises(DivergedError, match=said):
        build(tiny_folder, tmp_path / "b", **private)
    # recomputation is switched on when training begins
    with pytest.raises(DivergedError, match=said):
        trainer.train()
    build(tiny_folder, tmp_path / "c", **private, check_gradients=False).train()


@pytest.mark.slow
def test_the_model_is_never_wrapped_and_its_gradients_come_from_the_step_alone(tiny_folder, tmp_path, monkeypatch):
    seen = []
    finish = PrivateStep.finish

    def watched(self):
        seen.append([p.grad for p in self.parameters.values()])
        return finish(self)

    monkeypatch.setattr(PrivateStep, "finish", watched)
    trainer = build(tiny_folder, tmp_path)
    trainer.train()
    assert trainer.model_wrapped is trainer.model and not isinstance(trainer.model, nn.parallel.DistributedDataParallel)
    assert len(seen) == 2 and not any(gradient is not None for step in seen for gradient in step)


@pytest.mark.parametrize(
    "settings",
    [
        # which leaves the model in another mode
        dict(eval_strategy="steps", eval_steps=1),
        pytest.param(dict(gradient_checkpointing=True, dataloader_num_workers=1), marks=pytest.mark.slow),
        pytest.param(dict(logging_steps=3), marks=pytest.mark.slow),
    ],
)
def test_micro_batches_without_rows_are_not_run_and_nothing_changes(settings, tiny_folder, tmp_path, monkeypatch):
    """Bit for bit, noise included: a step of three rows in four micro-batches, one of none, one of five."""
    plan = [[0, 3, 5], [], [1, 2, 4, 6, 7]]
    fields = dict(target_epsilon=None, noise_multiplier=0.3, target_delta=1e-3, clip_norm=0.4, expected_batch_size=3)
    fields |= dict(per_device_train_batch_size=2, max_steps=3) | settings
    fields |= dict(eval_dataset=rows(4)) if "eval_strategy" in settings else {}
    made = functools.partial(build, tiny_folder, draws=lambda step: plan[step], **fields)
    counts, trainer = clipped.forwards_without_empty_micro_batches(
        lambda name: made(output_dir=tmp_path / name), "_forward", monkeypatch
    )
    # made-up rows show that gradients arrive, where activations are recomputed
    shown = int(trainer.args.gradient_checkpointing)
    assert trainer.args.gradient_accumulation_steps == 4
    assert [trained - shown for trained, _ in counts] == [2 + 1 + 3, 12]
    units = [entry["private/units"] for entry in entries(trainer)]
    assert units == ([8 / 3] if trainer.args.logging_steps == 3 else [3, 0, 5])


def test_epsilon_is_computed_while_steps_run_and_no_thread_is_left(tiny_folder, tmp_path, monkeypatch):
    of_losses, names = accounting._by_losses, []

    def noted(*args):
        names.append(threading.current_thread().name)
        return of_losses(*args)

    # a noise that no other test has, whose figures would be known
    trainer = build(tiny_folder, tmp_path, target_epsilon=None, noise_multiplier=1.0625, target_delta=1e-3, max_steps=3)
    monkeypatch.setattr(accounting, "_by_losses", noted)
    trainer.train()
    spent = [entry["privacy/epsilon"] for entry in entries(trainer)]
    # of all three steps it was known when the noise was settled
    assert names == ["posttrain-ahead"] * 2
    kind = trainer._plan.kind
    accounting._epsilon.cache_clear()
    assert spent == [accounting.epsilon([kind._replace(steps=steps)], 1e-3) for steps in (1, 2, 3)]
    assert "posttrain-ahead" not in {thread.name for thread in threading.enumerate()}
    # nor where training ends by an error
    trainer = build(tiny_folder, tmp_path / "b", target_epsilon=None, noise_multiplier=1.03125, target_delta=1e-3)
    monkeypatch.setattr(trainer._private.step, "finish", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "posttrain-ahead" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("settings", "done", "expected"),
    [
        (dict(), 0, 10), (dict(), 10, 10), (dict(), 13, 7), (dict(), 40, 0),
        (dict(logging_first_step=True), 0, 1), (dict(logging_first_step=True), 1, 9),
        (dict(logging_strategy="epoch"), 0, 7), (dict(logging_strategy="epoch"), 9, 5),
        (dict(logging_strategy="no"), 0, 0),
    ],
)  # fmt: skip
def test_the_next_log_is_where_the_settings_say(settings, done, expected):
    args = types.SimpleNamespace(**dict(logging_strategy="steps", logging_first_step=False) | settings)
    state = types.SimpleNamespace(global_step=done, logging_steps=10, max_steps=45)
    assert private.steps_to_log(types.SimpleNamespace(args=args, state=state), 7) == expected


@pytest.mark.slow
def test_evaluation_is_the_mean_of_rows_and_draws_nothing(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path)
    held_out = trainer.evaluate(rows())
    losses = []
    data = Dataset.from_list(list(trainer.train_dataset))
    for row in range(8):
        ids, labels = (torch.tensor([data[row][name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits[0, :-1]
        losses.append(F.cross_entropy(logits, labels[0, 1:], ignore_index=-100).item())
    assert held_out["eval_loss"] == pytest.approx(sum(losses) / 8, rel=1e-4)


@pytest.mark.slow
def test_a_trainer_trains_once_as_its_noise_is_for_that(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, target_epsilon=None, noise_multiplier=1.0, target_delta=1e-3)
    trainer.train()
    with pytest.raises(ConfigError, match="this trainer has taken 2 private steps already"):
        trainer.train()


@pytest.mark.slow
def test_canaries_take_part_and_their_bound_is_told(tiny_folder, tmp_path):
    private = dict(target_epsilon=None, noise_multiplier=1.0, target_delta=1e-3, audit_canaries=100)
    trainer = build(tiny_folder, tmp_path, **private, draws=lambda step: [], expected_batch_size=8)
    change, _ = runs.fit(trainer)
    canaries, told = trainer._private.canaries, trainer.promise().audit
    assert canaries.steps == 2 and told["canaries"] == 100 and told["lower_bound"] < trainer._plan.epsilon
    flat = torch.cat([change[name].flatten() for name in trainer._private.gradients.parameters])
    moved = -flat[canaries.places] * 8 / 0.5
    # each of those that take part adds the clipping norm in both steps, as every unit is drawn in each
    gap = moved[torch.from_numpy(canaries.included)].mean() - moved[torch.from_numpy(~canaries.included)].mean()
    assert gap.item() == pytest.approx(2, abs=1.5)


def test_canaries_of_a_run_that_goes_on_are_the_same_ones_with_the_scores_they_had(tiny_folder, tmp_path):
    settings = dict(target_epsilon=None, noise_multiplier=1.0, target_delta=1e-3, audit_canaries=100, save_steps=1)
    first = build(tiny_folder, tmp_path, **settings, save_strategy="steps", max_steps=1)
    first.train()
    before = first._private.canaries
    scores = before.scores.copy()
    again = build(tiny_folder, tmp_path, **settings, save_strategy="steps", max_steps=2)
    load, loaded = again._private.canaries.load, []
    again._private.canaries.load = lambda state: (load(state), loaded.append(again._private.canaries.scores.copy()))
    again.train(resume_from_checkpoint="auto")
    after = again._private.canaries
    assert torch.equal(after.places, before.places) and (after.included == before.included).all()
    assert (loaded[0] == scores).all() and after.steps == 2 and (after.scores != scores).any()


@pytest.mark.parametrize(
    "settings",
    [
        dict(bf16=True, use_cpu=True, gradient_checkpointing=True),
        pytest.param(dict(bf16=True, use_cpu=True), marks=pytest.mark.slow),
        pytest.param(dict(gradient_checkpointing=True), marks=pytest.mark.slow),
        pytest.param(
            dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(dataloader_num_workers=1), marks=pytest.mark.slow),
    ],
)
def test_precision_recomputation_and_workers_change_nothing_but_rounding(settings, tiny_folder, tmp_path):
    clipped = dict(clip_norm=0.4, per_device_train_batch_size=4)
    reference, _ = runs.fit(build(tiny_folder, tmp_path / "a", **clipped))
    change, _ = runs.fit(build(tiny_folder, tmp_path / "b", **clipped, **settings))
    assert distance(change, reference) < (0.1 if "bf16" in settings else 1e-5)


@pytest.mark.slow
def test_an_adapter_on_a_4bit_base_is_trained(tiny_folder, tmp_path):
    quantization = get_quantization_config(ModelConfig(load_in_4bit=True))
    fields = runs.SETTINGS | dict(output_dir=str(tmp_path), learning_rate=0.5) | NOISELESS
    given = dict(train_dataset=rows(), peft_config=runs.lora(), quantization_config=quantization)
    trainer = DPSFTTrainer(tiny_folder, DPSFTConfig(**fields), **given)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    change, _ = runs.fit(trainer)
    assert all(value.any() for name, value in change.items() if "lora_B" in name)
