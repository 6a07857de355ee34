"""Noise in supervised fine-tuning: none is `trl.SFTTrainer`, and the split of a batch changes no update."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from trl import SFTConfig, SFTTrainer

from posttrain import NoisySFTConfig, NoisySFTTrainer
from posttrain.config import parse
from posttrain.config.setting import identity_of, told_in_card, undeclared
from posttrain.errors import ConfigError, DataError
from posttrain.hub import write_model_card
from posttrain.mechanisms.noise import draws
from posttrain.models import byte_tokenizer, tiny_model
from posttrain.recipe import instructions
from tests.conftest import WORDS
from tests.training import distance, trainable

NOISE = dict(embedding_noise="neftune", noise_alpha=1.5)
ONE = dict(per_device_train_batch_size=8, gradient_accumulation_steps=1)


def make_rows(n=16):
    def said(role, *words):
        return [{"role": role, "content": " ".join(words)}]

    return Dataset.from_list(
        [
            {
                "prompt": said("user", WORDS[i % 12], str(i)),
                "completion": said("assistant", *(WORDS[(3 * i + j) % 12] for j in range(1 + i % 5))),
            }
            for i in range(n)
        ]
    )


def as_messages(rows):
    return rows.map(lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=rows.column_names)


def build(folder, trainer_class=NoisySFTTrainer, rows=None, peft_config=None, **overrides):
    given = {name: overrides.pop(name) for name in ("eval_dataset", "callbacks", "data_collator") if name in overrides}
    kind = overrides.pop("kind", {})
    fields = dict(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=0.05,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, max_steps=2, seed=3, logging_steps=1,
        save_strategy="no", disable_tqdm=True, report_to=[],
    )  # fmt: skip
    config_class = SFTConfig if trainer_class is SFTTrainer else NoisySFTConfig
    return trainer_class(
        tiny_model(**kind), args=config_class(**{**fields, **ONE, **overrides}),
        train_dataset=make_rows() if rows is None else rows, processing_class=byte_tokenizer(),
        peft_config=peft_config, **given,
    )  # fmt: skip


def train(folder, *args, resume=None, **kwargs):
    trainer = build(folder, *args, **kwargs)
    before = trainable(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    after = trainable(trainer.model)
    return {name: after[name] - before[name] for name in before}, trainer


def logs_of(trainer):
    timed = ("train_runtime", "_per_second", "eval_runtime")
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in timed)}
        for entry in trainer.state.log_history
    ]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return train(tmp_path_factory.mktemp("noisy"), **NOISE)


LORA = LoraConfig(r=4, target_modules="all-linear")
NEUTRAL = {
    "split": (dict(per_device_train_batch_size=2, gradient_accumulation_steps=4), None, None),
    "messages": (dict(assistant_only_loss=True), as_messages, None),
    "packed": (dict(packing=True, max_length=128, per_device_train_batch_size=1), None, None),
    "adapter": (dict(gradient_checkpointing=True), None, LORA),
    "every token": (dict(completion_only_loss=False, max_length=24, truncation_mode="keep_start"), None, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NEUTRAL)
def test_without_noise_it_is_sft_trainer_bit_for_bit(case, tmp_path):
    settings, changed, peft_config = NEUTRAL[case]
    rows = (changed or (lambda rows: rows))(make_rows())
    settings = dict(settings, eval_strategy="steps", eval_steps=1, eval_dataset=rows.select(range(3)))
    expected, theirs = train(tmp_path / "theirs", SFTTrainer, rows, peft_config, **settings)
    for name, neutral in (("none", {}), ("zero", dict(embedding_noise="neftune", noise_alpha=0))):
        change, ours = train(tmp_path / name, NoisySFTTrainer, rows, peft_config, **settings, **neutral)
        assert change.keys() == expected.keys() and any(value.any() for value in change.values())
        assert all(torch.equal(change[key], expected[key]) for key in expected)
        assert logs_of(ours) == logs_of(theirs)


@pytest.mark.core("padding-free")
@pytest.mark.parametrize(
    "layout",
    [
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=8, padding_free=True, max_length=None),
        dict(padding_free=True, max_length=None, pad_to_multiple_of=64),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    ],
    ids=["split", "padding-free", "filled up", "reentrant", "not reentrant"],
)
def test_the_layout_of_a_batch_changes_no_update(layout, noisy, tmp_path):
    change, trainer = train(tmp_path, **NOISE, **layout)
    assert distance(change, noisy[0]) < 1e-5
    told = [entry["noise/ratio"] for entry in trainer.state.log_history if "noise/ratio" in entry]
    known = [entry["noise/ratio"] for entry in noisy[1].state.log_history if "noise/ratio" in entry]
    assert told == pytest.approx(known, rel=1e-4) and min(told) > 0


def test_the_update_by_the_head_of_learned_tokens_is_that_by_trls(noisy, tmp_path, monkeypatch):
    assert noisy[1]._learned_head.is_right
    monkeypatch.setattr(NoisySFTTrainer, "_may_score_learned_tokens", lambda self: False)
    change, trainer = train(tmp_path, **NOISE)
    assert trainer._learned_head is None
    assert distance(change, noisy[0]) < 1e-5


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "settings", [dict(loss_type="dft"), dict(label_smoothing_factor=0.1), dict(length_mode="tensor")], ids=str
)
def test_any_other_loss_is_scored_by_trls_head(settings, tmp_path):
    assert build(tmp_path, **NOISE, **settings)._learned_head is None


def test_packed_sequences_have_the_noise_of_their_own_length(tmp_path, monkeypatch):
    packed = dict(packing=True, max_length=4096, per_device_train_batch_size=1, max_steps=1)
    expected, _ = train(tmp_path / "one", **NOISE, per_device_train_batch_size=16, max_steps=1)
    clean, _ = train(tmp_path / "clean", per_device_train_batch_size=16, max_steps=1)
    change, trainer = train(tmp_path / "packed", **NOISE, **packed)
    assert len(trainer.train_dataset) == 1 and distance(change, expected) < 1e-5
    assert distance(clean, expected) > 0.1
    # one length for the whole row, as in other implementations
    own = draws.scales
    monkeypatch.setattr(
        draws, "scales", lambda kind, alpha, found, size: own(
            kind, alpha, found._replace(lengths=torch.full_like(found.lengths, found.real.sum().item())), size
        ),
    )  # fmt: skip
    wrong, _ = train(tmp_path / "wrong", **NOISE, **packed)
    assert distance(wrong, expected) > 1e-2


SYMNOISE = dict(embedding_noise="symnoise", noise_alpha=0.8)


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory):
    return train(tmp_path_factory.mktemp("symmetric"), **SYMNOISE, per_device_train_batch_size=16, max_steps=1)


@pytest.mark.core("packed")
@pytest.mark.parametrize(
    "layout",
    [
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=16, padding_free=True, max_length=None),
        dict(packing=True, max_length=4096, per_device_train_batch_size=1),
        dict(per_device_train_batch_size=16, gradient_checkpointing=True),
    ],
    ids=["split", "padding-free", "packed", "checkpointed"],
)
def test_both_signs_make_one_update_whatever_the_layout(layout, symmetric, tmp_path):
    expected, whole = symmetric
    change, trainer = train(tmp_path, **SYMNOISE, max_steps=1, **layout)
    assert distance(change, expected) < 1e-5
    # each token once, though it is forwarded twice
    for name in ("num_tokens", "loss", "noise/ratio"):
        assert trainer.state.log_history[0][name] == pytest.approx(whole.state.log_history[0][name], rel=1e-4), name


def test_the_update_is_even_in_the_noise_and_that_of_one_sign_is_not(symmetric, tmp_path, monkeypatch):
    whole = dict(SYMNOISE, per_device_train_batch_size=16, max_steps=1)
    drawn = draws.KINDS["symnoise"]
    other = drawn._replace(draw=lambda keys, size: -draws.signs(keys, size))
    monkeypatch.setitem(draws.KINDS, "symnoise", other)
    turned, _ = train(tmp_path / "turned", **whole)
    assert distance(turned, symmetric[0]) < 1e-5
    clean, _ = train(tmp_path / "clean", per_device_train_batch_size=16, max_steps=1)
    assert distance(clean, symmetric[0]) > 0.1
    # the known wrong form, which calls itself by the same name: the noise of one sign alone
    monkeypatch.setitem(draws.KINDS, "uniform", drawn)
    single, _ = train(tmp_path / "single", **whole | dict(embedding_noise="uniform"))
    assert distance(single, symmetric[0]) > 1e-2


NOISEFIT = dict(hidden_noise="noisefit", hidden_noise_scale=0.3, consistency_weight=5.0, noise_layer_count=1)


@pytest.mark.slow
def test_layers_below_others_take_packed_rows_and_words_of_a_command_line(tmp_path):
    low = dict(NOISEFIT, noise_layers=[0], noise_layer_count=3, max_steps=1)
    whole, _ = train(tmp_path / "whole", **low, per_device_train_batch_size=16)
    packed, trainer = train(tmp_path / "packed", **low, packing=True, max_length=4096, per_device_train_batch_size=1)
    assert distance(packed, whole) < 1e-4 and not trainer._hidden.passes.from_start
    for words, layers in ((["snr_low"], "snr_low"), (["auto"], "auto"), (["0", "1"], [0, 1]), ("[1]", [1])):
        assert NoisySFTConfig(str(tmp_path), hidden_noise="noisefit", noise_layers=words).noise_layers == layers


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    settings = dict(NOISEFIT, per_device_train_batch_size=16, max_steps=2, save_strategy="steps", save_steps=1)
    return train(tmp_path_factory.mktemp("fitted"), **settings)


@pytest.mark.core("packed", "checkpointed")
@pytest.mark.parametrize(
    "layout",
    [
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=16, padding_free=True, max_length=None),
        dict(packing=True, max_length=4096, per_device_train_batch_size=1),
        dict(per_device_train_batch_size=16, gradient_checkpointing=True),
    ],
    ids=["split", "padding-free", "packed", "checkpointed"],
)
def test_passes_with_hidden_noise_make_one_update_whatever_the_layout(layout, fitted, tmp_path):
    expected, whole = fitted
    change, trainer = train(tmp_path, **NOISEFIT, max_steps=2, **layout)
    assert trainer._hidden.chosen == whole._hidden.chosen and distance(change, expected) < 1e-4
    for name in ("num_tokens", "loss", "noise/ratio", "noise/divergence", "noise/consistency"):
        assert trainer.state.log_history[0][name] == pytest.approx(whole.state.log_history[0][name], rel=1e-3), name


def test_hidden_noise_changes_the_update_and_is_in_no_evaluation(fitted, tmp_path):
    clean, _ = train(tmp_path / "clean", per_device_train_batch_size=16, max_steps=2)
    assert distance(clean, fitted[0]) > 0.1
    rows = make_rows().select(range(5))
    losses = []
    for name, settings in (("noisy", NOISEFIT), ("plain", {})):
        trainer = build(tmp_path / name, **settings, learning_rate=0.0, eval_dataset=rows)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_layers_are_those_of_the_greatest_ratio_and_are_kept_on_resumption(fitted, tmp_path, monkeypatch):
    _, whole = fitted
    snr = whole._hidden.snr
    assert len(snr) == 2 and whole._hidden.chosen == [snr.index(max(snr))]
    told = yaml.safe_load(Path(whole.args.output_dir, "resolved_config.yaml").read_text())["found"]
    assert told == {"noisy layers": whole._hidden.chosen, "signal to noise behind each layer": snr}
    card = re.sub(" +", " ", write_model_card(whole).read_text())
    assert f"| noisy layers | {whole._hidden.chosen[0]} |" in card
    assert f"| signal to noise behind each layer | {snr[0]:.4g}, {snr[1]:.4g} |" in card
    low = build(tmp_path / "low", **NOISEFIT, noise_layers="snr_low")
    low.train()
    assert low._hidden.chosen == [snr.index(min(snr))]
    settings = dict(NOISEFIT, per_device_train_batch_size=16)
    resumed = build(tmp_path / "run", **settings)
    monkeypatch.setattr(type(resumed._hidden), "_measured", lambda *args: pytest.fail("measured again"))
    checkpoint = f"{whole.args.output_dir}/checkpoint-1"
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed._hidden.chosen == whole._hidden.chosen and resumed._hidden.snr == snr
    with pytest.raises(ConfigError, match="hidden: noisefit 0.3 mad behind snr_high 1 of 32 rows, .* there"):
        build(tmp_path / "other", **settings | dict(hidden_noise_scale=0.2)).train(resume_from_checkpoint=checkpoint)


@pytest.mark.slow
def test_layers_and_scales_may_be_found_by_what_noise_does(tmp_path):
    settings = dict(hidden_noise="noisefit", noise_layers="auto", noise_calibration_rows=8, max_steps=2)
    _, trainer = train(tmp_path / "a", **settings, save_strategy="steps", save_steps=1)
    held = trainer._hidden
    assert held.chosen == held.passes.layers and len(held.chosen) == len(held.bases) and len(held.snr) == 2
    # a strength that is tried, over the root of 64 channels
    assert {base * 8 for base in held.bases} <= {0.25, 0.5, 1.0, 1.5, 2.0}
    resumed = build(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert (resumed._hidden.chosen, resumed._hidden.bases) == (held.chosen, held.bases)
    weights = trainable(trainer.model)
    assert all(torch.equal(value, weights[name]) for name, value in trainable(resumed.model).items())


@pytest.mark.parametrize(
    ("alpha", "text"),
    [
        (
            1e6,
            "noise_alpha is 1e.06, and the first step's noise has .* times the norm of the embeddings. Set it to [12]",
        ),
        (1e30, "noise_alpha is 1e.30, and the first step's noise has .* times the norm of the embeddings"),
        (
            1e-30,
            "noise_alpha is 1e-30, and the first step's noise has no size. Set it higher, or `embedding_noise: none`",
        ),
    ],
)
def test_noise_above_the_embeddings_or_of_no_size_stops_the_run(alpha, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        train(tmp_path, **NOISE | dict(noise_alpha=alpha))


def test_noise_above_the_states_stops_the_run(tmp_path):
    with pytest.raises(ConfigError, match="behind decoder layer [01] the noise has .* times the norm of the states"):
        train(tmp_path, **NOISEFIT | dict(hidden_noise_scale=100.0))


@pytest.mark.parametrize(
    ("settings", "given", "text"),
    [
        (
            dict(noise_layers=[0, 2], noise_layer_count=3),
            {},
            "noise_layers names layer 2, and the model has 2 decoder layers",
        ),
        (dict(noise_layer_count=3), {}, "noise_layer_count is 3, and the model has 2 decoder layers"),
        ({}, dict(peft_config=LoraConfig(r=4, lora_dropout=0.05)), "lora_dropout is 0.05 with hidden_noise"),
        ({}, dict(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "PROMPT_TUNING, whose"),
        (
            {},
            dict(kind=dict(architecture="gpt2", resid_pdrop=0.1, attn_pdrop=0.0, embd_pdrop=0.0)),
            "dropout of its own .resid_pdrop 0.1, .* Set `model_init_kwargs: {resid_pdrop: 0.0, ",
        ),
        ({}, dict(kind=dict(attention_dropout=0.1)), "dropout of its own .attention_dropout 0.1. with hidden_noise"),
    ],
)
def test_what_passes_cannot_be_made_of_is_refused(tmp_path, settings, given, text):
    with pytest.raises(ConfigError, match=text):
        build(tmp_path, **NOISEFIT | settings, **given)


def test_a_batch_of_a_collator_that_cannot_be_repeated_is_refused(tmp_path):
    def collator(examples):
        ids = torch.tensor([example["input_ids"][:8] for example in examples])
        return dict(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), weights=torch.ones(len(ids)))

    with pytest.raises(ConfigError, match="the batch holds weights .8,., and this kind of noise"):
        train(tmp_path, **SYMNOISE, data_collator=collator)


def test_evaluation_and_generation_are_clean_in_a_noisy_run(tmp_path):
    rows = make_rows()
    noisy = build(tmp_path / "noisy", **NOISE, learning_rate=0.0, eval_dataset=rows.select(range(5)))
    seen = []

    class Generates:
        def __getattr__(self, name):
            def event(args, state, control, **kwargs):
                if name == "on_step_end":
                    assert noisy.model.training
                    ids = torch.tensor([[65, 66, 67]])
                    with torch.no_grad():
                        seen.append(noisy.model(input_ids=ids).logits)
                return control

            return event

    noisy.callback_handler.callbacks.append(Generates())
    before = noisy.model(input_ids=torch.tensor([[65, 66, 67]])).logits
    at_start = noisy.evaluate()["eval_loss"]
    noisy.train()
    assert len(seen) == 2 and all(torch.equal(logits, before) for logits in seen)
    clean = build(tmp_path / "clean", learning_rate=0.0, eval_dataset=rows.select(range(5)))
    assert noisy.evaluate()["eval_loss"] == clean.evaluate()["eval_loss"] == at_start
    losses = [entry["loss"] for entry in noisy.state.log_history if "loss" in entry]
    clean.train()
    assert losses != [entry["loss"] for entry in clean.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "adapter"])
def test_a_resumed_run_draws_the_noise_of_the_uninterrupted_one(peft_config, tmp_path):
    settings = dict(NOISE, max_steps=3, save_strategy="steps", save_steps=1)
    _, whole = train(tmp_path, None or NoisySFTTrainer, peft_config=peft_config, **settings)
    weights = trainable(whole.model)
    resumed = build(tmp_path, peft_config=peft_config, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 3
    assert all(torch.equal(value, weights[name]) for name, value in trainable(resumed.model).items())
    with pytest.raises(ConfigError, match="noise: neftune 1.5 there, neftune 1 here"):
        build(tmp_path, peft_config=peft_config, **settings | dict(noise_alpha=1)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_fields_declare_their_meaning_and_only_noise_that_is_there_counts(tmp_path):
    def made(**settings):
        return NoisySFTConfig(str(tmp_path), **settings)

    assert undeclared(NoisySFTConfig) == []
    assert identity_of(made()) == identity_of(made(embedding_noise="neftune", noise_alpha=0))
    assert len({identity_of(made(**NOISE | dict(noise_alpha=alpha)))["noise"] for alpha in (0, 1, 2)}) == 3
    assert told_in_card(made(**NOISE)) == NOISE and told_in_card(made()) == {}


def test_a_config_may_be_copied_with_another_value(tmp_path):
    args = dataclasses.replace(NoisySFTConfig(str(tmp_path)), embedding_noise="neftune")
    assert args.noise == "neftune 5" and dataclasses.replace(args, embedding_noise="none").noise is None


def test_strengths_that_differ_a_little_are_two(tmp_path):
    told = {NoisySFTConfig(str(tmp_path), **NOISE | dict(noise_alpha=alpha)).noise for alpha in (5, 5.0, 5.0000004)}
    assert told == {"neftune 5", "neftune 5.0000004"}


@pytest.mark.parametrize(
    "batch",
    [
        dict(input_ids=torch.zeros(1, 9, dtype=torch.long), real_rows=0),
        dict(input_ids=torch.zeros(1, 9, dtype=torch.long), row_lengths=torch.tensor([4, 3, 2]), real_rows=0),
        dict(input_ids=torch.zeros(2, 9), attention_mask=torch.tensor([[1] * 9, [0] * 9]), real_rows=0),
    ],
    ids=["packed", "padding-free", "padded"],
)
def test_tokens_of_rows_that_fill_up_are_counted_in_every_layout(tmp_path, batch):
    trainer = NoisySFTTrainer.__new__(NoisySFTTrainer)
    assert trainer._repeated_tokens(batch) == 9
    assert trainer._repeated_tokens(batch | dict(real_rows=trainer.rows_in(batch))) == 0


def test_the_noise_of_a_file_gives_way_to_no_setting_but_its_own(tmp_path):
    (tmp_path / "run.yaml").write_text("embedding_noise: neftune\nnoise_alpha: 7\nmax_length: 64\n")

    def read(*flags):
        (args,) = parse((NoisySFTConfig,), ["--config", str(tmp_path / "run.yaml"), "--output_dir", "run", *flags])
        return args

    assert read().adds_noise and not read("--embedding_noise", "none").adds_noise
    for flags, text in (
        (["--packing", "true", "--packing_strategy", "wrapped"], "packing_strategy is wrapped with embedding_noise"),
        (["--torch_compile", "true"], "torch_compile is true with embedding_noise: neftune"),
        (["--padding_free", "true"], r"nothing cuts rows to max_length \(64\)"),
    ):
        with pytest.raises(ConfigError, match=text):
            read(*flags)


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        ([{"chosen": "a", "rejected": "b"}], DataError, "Needed: prompt and completion, messages, or text"),
        ([{"prompt": "a", "completion": ""}], DataError, "row 1: completion is empty"),
        ([{"prompt": "a", "completion": "b", "images": [1]}], DataError, "has the column images"),
        ([{"instruction": "a", "output": "b"}], DataError, "Convert them first"),
        ([{"prompt": "a" * 40, "completion": "b"}], DataError, "no row has a token that would be learned"),
        ([{"text": "a"}], ConfigError, "assistant_only_loss is true, and the rows are texts"),
    ],
)
def test_rows_are_refused_before_the_model_loads(rows, error, text, tmp_path, monkeypatch):

    @functools.wraps(SFTTrainer.__init__)
    def loads(*args, **kwargs):
        pytest.fail("the parent's constructor was called")

    monkeypatch.setattr(SFTTrainer, "__init__", loads)
    with pytest.raises(error, match=text):
        build(tmp_path, rows=Dataset.from_list(rows), max_length=32, assistant_only_loss="text" in rows[0])


def test_rows_that_fill_no_batch_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="3 kept rows fill no batch of 8"):
        build(tmp_path, rows=make_rows(3), dataloader_drop_last=True)


def test_virtual_tokens_and_formatting_functions_are_refused(tmp_path):
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="PROMPT_TUNING, whose virtual tokens"):
        build(tmp_path, peft_config=virtual, **NOISE)
    with pytest.raises(ConfigError, match="formatting_func is given"):
        NoisySFTTrainer(tiny_model(), train_dataset=make_rows(), formatting_func=str)


def test_a_stream_of_rows_is_trained_on_as_the_rows_are(tmp_path):
    rows = make_rows()
    expected, _ = train(tmp_path / "rows", rows=rows, **NOISE, train_sampling_strategy="sequential")
    change, _ = train(tmp_path / "stream", rows=rows.to_iterable_dataset(), **NOISE)
    assert distance(change, expected) < 1e-5


@pytest.mark.core("packed")
@pytest.mark.parametrize(
    "settings",
    [
        dict(max_steps=-1, packing=True, max_length=128),
        dict(max_steps=-1, max_length=40),
        dict(max_steps=-1, max_length=40, truncation_mode="keep_end"),
    ],
    ids=["packed", "cut", "cut in front"],
)
@pytest.mark.filterwarnings("ignore:The .*keep_end:FutureWarning")
def test_a_dry_run_tells_the_steps_of_the_trainer(settings, tiny_folder, tmp_path):
    rows = make_rows(13)
    trainer = build(tmp_path, rows=rows, per_device_train_batch_size=2, **settings)
    told = instructions.describe(tiny_folder, trainer.args, rows)
    trainer.train()
    assert told["steps"] == trainer.state.max_steps
    assert told.get("rows packed into", told.get("of them within max_length")) == len(trainer.train_dataset)
    trained = trainer.train_dataset
    assert told["longest row (tokens)"] == max(map(len, trained["input_ids"]))
    labels = [label for row in trained["labels"] for label in row]
    share = sum(label != -100 for label in labels) / len(labels)
    assert told["share of tokens that are learned"] == f"{share:.1%}"
    assert told["prompt"].endswith("assistant\n") and told["completion"].startswith("amber")


@pytest.mark.parametrize("settings", [{}, {"eos_token": "<|im_end|>"}], ids=["before", "with the model"])
def test_packed_rows_that_fill_no_batch_are_refused(settings, tiny_folder, tmp_path):
    few = dict(packing=True, max_length=1024, dataloader_drop_last=True, max_steps=-1, **settings)
    with pytest.raises(ConfigError, match="1 kept rows fill no batch of 8 .*Set `dataloader_drop_last: false`"):
        build(tmp_path, **few)
    assert build(tmp_path, **few | {"dataloader_drop_last": False}).train_dataset.num_rows == 1


def test_a_dry_run_refuses_packed_rows_that_fill_no_batch_and_tells_steps_of_full_ones(tiny_folder, tmp_path):
    given = dict(output_dir=str(tmp_path), packing=True, dataloader_drop_last=True, use_cpu=True, bf16=False)
    args = NoisySFTConfig(**given, max_length=1024)
    with pytest.raises(ConfigError, match="1 kept rows fill no batch of 8"):
        instructions.describe(tiny_folder, args, make_rows())
    args = NoisySFTConfig(**given, max_length=128, per_device_train_batch_size=2, shuffle_dataset=True)
    told = instructions.describe(tiny_folder, args, make_rows())
    trainer = build(tmp_path, packing=True, max_length=128, shuffle_dataset=True, seed=args.seed)
    assert told["rows packed into"] == len(trainer.train_dataset)
    assert told["steps"] == 3 * (len(trainer.train_dataset) // 2) > 0


def test_rows_are_read_from_files_of_every_kind(tmp_path):
    from posttrain.data.instructions.loading import load_instructions

    def read(row):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        return load_instructions(str(tmp_path / "rows.jsonl"))[0]

    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert read({"prompt": "a", "completion": "b"}) == {"prompt": "a", "completion": "b"}
    assert read({"text": "ab", "other": 1}) == {"text": "ab"}
    assert read({"messages": [user, answer]}) == {"messages": [user, answer]}
    assert read({"instruction": "a", "output": "b"}) == {"prompt": [user], "completion": [answer]}
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert read({"conversations": turns}) == {"messages": [user, answer]}
    assert read({"question": "a", "answer": "b"}) == {"prompt": [user], "completion": [answer]}
    system = {"role": "system", "content": "s"}
    assert read({"messages": [user, answer], "system": "s"}) == {"messages": [system, user, answer]}
    assert read({"prompt": "a", "completion": "b", "tools": None})["completion"] == "b"
    for row, text in (
        ({"prompt": "a", "completion": None}, "line 1: completion is null"),
        ({"prompt": "a", "completion": [answer]}, "completion is a list of messages, and in .*line 1 it is a text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Needed: prompt and completion"),
    ):
        with pytest.raises(DataError, match=text):
            read(row)
    assert set(load_instructions("generated:arithmetic?n=3").column_names) == {"prompt", "completion"}
