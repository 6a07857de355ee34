import logging

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.models import byte_tokenizer, tiny_model
from tests.conftest import make_pairs
from tests.training import distance, lora, losses, settings, train

# TRL is giving it up
KEEP_END = pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
ACCUMULATE = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO, logger="posttrain")
    return lambda: caplog.text


def build(folder, out, peft=True, pairs=None, **overrides):
    args = RobustDPOConfig(**settings(out, **overrides))
    peft_config = lora() if peft is True else peft or None
    return RobustDPOTrainer(folder, args=args, train_dataset=pairs or make_pairs(8), peft_config=peft_config)


def save(folder, model):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        dict(precompute_ref_log_probs=True),
        dict(gradient_checkpointing=True),
        dict(ld_alpha=0.5),
        dict(pair_loss="ipo"),
        pytest.param(dict(truncation_mode="keep_end", max_length=60), marks=KEEP_END),
        dict(model_init_kwargs={"attn_implementation": "eager"}),
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_with_every_setting_that_touches_the_forward(tiny_folder, tmp_path, extra):
    extra = dict(pair_loss="dpo") | extra
    padded, first = train(tiny_folder, tmp_path / "padded", prefix_sharing="never", **ACCUMULATE, **extra)
    shared, second = train(tiny_folder, tmp_path / "shared", prefix_sharing="always", **ACCUMULATE, **extra)
    assert distance(shared, padded) <= 1e-4
    first, second = ([row for row in t.state.log_history if "loss" in row] for t in (first, second))
    for ours, theirs in zip(second, first, strict=True):
        assert ours["num_tokens"] == theirs["num_tokens"]
        for name in ("logps/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "rewards/margins"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_bf16_stays_close(tiny_folder, tmp_path):
    padded, _ = train(tiny_folder, tmp_path / "padded", prefix_sharing="never", bf16=True, pair_loss="dpo")
    shared, _ = train(tiny_folder, tmp_path / "shared", prefix_sharing="always", bf16=True, pair_loss="dpo")
    assert distance(shared, padded) < 0.05


@pytest.mark.slow
def test_evaluation_and_reference_are_shared_as_well(tiny_folder, tmp_path, monkeypatch):
    results = {}
    for setting in ("never", "always"):
        trainer = build(tiny_folder, tmp_path / setting, prefix_sharing=setting)
        packed = []
        inner = trainer.model.get_base_model().forward
        monkeypatch.setattr(
            trainer.model.get_base_model(),
            "forward",
            lambda *args, _packed=packed, _inner=inner, **kwargs: (
                _packed.append("packed" in kwargs) or _inner(*args, **kwargs)
            ),
        )
        results[setting] = trainer.evaluate(make_pairs(6, seed=4))
        results[setting, "packed"] = packed[4:] if setting == "always" else packed
    names = [name for name in results["never"] if "/" in name or name == "eval_loss"]
    for name in names:
        assert results["always"][name] == pytest.approx(results["never"][name], rel=1e-4, abs=1e-5), name
    # after the four forwards of the check: policy and reference
    assert results["always", "packed"] == [True, True] and results["never", "packed"] == [False, False]


@pytest.mark.slow
def test_what_is_padded_and_how_fast_is_logged(tiny_folder, tmp_path):
    shares = {}
    for setting in ("never", "auto"):
        _, trainer = train(tiny_folder, tmp_path / setting, prefix_sharing=setting)
        row = trainer.state.log_history[0]
        assert row["tokens/per_second"] > 0
        shares[setting] = row["tokens/padding_share"]
    assert 0 <= shares["auto"] < shares["never"] < 1
    assert row["prefix_sharing/unshared"] == 0
    batch = next(iter(trainer.get_train_dataloader()))
    packed = trainer._sharing.pack(batch, 2 * list(range(8)))
    assert packed.tokens < batch["attention_mask"].sum()


@pytest.mark.slow
@KEEP_END
def test_sides_cut_at_different_places_are_counted(tiny_folder, tmp_path, said):
    pairs = make_pairs(16)
    _, trainer = train(
        tiny_folder, tmp_path, pairs=pairs, truncation_mode="keep_end", max_length=40, prefix_sharing="always"
    )
    assert 0 < trainer.state.log_history[0]["prefix_sharing/unshared"] <= 1
    assert said().count("some pairs' prompts differ between the sides") == 1


def test_the_default_shares(tiny_folder, tmp_path):
    assert RobustDPOConfig(str(tmp_path)).prefix_sharing == "auto"
    assert build(tiny_folder, tmp_path)._sharing.active


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="prefix_sharing is 'on'; it must be one of auto, always, never"):
        RobustDPOConfig(str(tmp_path), prefix_sharing="on")


PROMPT_TUNING = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")


def test_virtual_tokens_fall_back_with_the_reason(tiny_folder, tmp_path, said):
    trainer = build(tiny_folder, tmp_path / "a", peft=PROMPT_TUNING)
    assert not trainer._sharing.active
    assert said().count("prefix sharing is not used: PROMPT_TUNING puts virtual tokens in front") == 1
    with pytest.raises(ConfigError, match="prefix_sharing is always, which does not work here: PROMPT_TUNING"):
        build(tiny_folder, tmp_path / "b", peft=PROMPT_TUNING, prefix_sharing="always")


def test_always_is_refused_before_the_model_loads(tmp_path):
    # a folder without weights: loading it would fail with another error
    folder = tmp_path / "model"
    tiny_model("qwen3", layer_types=["linear_attention", "full_attention"]).config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match="layers of type linear_attention do not go by a mask"):
        build(str(folder), tmp_path / "out", prefix_sharing="always")


@pytest.mark.slow
def test_a_window_shorter_than_a_row_pads_that_batch(tmp_path, said):
    folder = save(tmp_path / "model", tiny_model("mistral", sliding_window=48))
    runs = {}
    for setting in ("never", "auto"):
        runs[setting], trainer = train(
            folder, tmp_path / setting, pair_loss="dpo", prefix_sharing=setting, **ACCUMULATE
        )
    assert trainer._sharing.active
    assert distance(runs["auto"], runs["never"]) <= 1e-4
    assert said().count("a batch is padded, not shared: it has rows longer than the sliding window of 48") == 1
    with pytest.raises(ConfigError, match="longer than the sliding window of 48"):
        build(folder, tmp_path / "always", prefix_sharing="always")


@pytest.mark.slow
def test_a_model_that_answers_otherwise_when_packed_is_padded(tiny_folder, tmp_path, said, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    inner = LlamaModel.forward

    def forward(self, *args, position_ids=None, **kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            kwargs["attention_mask"] = None
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    padded, _ = train(tiny_folder, tmp_path / "a", pair_loss="dpo", prefix_sharing="never")
    change, trainer = train(tiny_folder, tmp_path / "b", pair_loss="dpo")
    assert distance(change, padded) == 0
    assert not trainer._sharing.active and trainer.model.training
    assert "prefix sharing is not used: packed log-probs differ from padded ones by up to" in said()
    with pytest.raises(ConfigError, match="packed log-probs differ"):
        train(tiny_folder, tmp_path / "c", pair_loss="dpo", prefix_sharing="always")


def test_the_check_leaves_modes_and_random_state_alone(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path)
    trainer.model.train()
    frozen = trainer.model.get_base_model().model.norm
    frozen.eval()
    state = torch.get_rng_state()
    trainer._sharing.check(trainer.model)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training and not frozen.training


@pytest.mark.slow
def test_one_token_answers_and_rows_without_an_end(tmp_path, tiny_folder):
    # plain text: no end-of-turn is added to what already holds tokens
    rows = [{"prompt": "a", "chosen": "b", "rejected": c} for c in ("c", "dd", "eee", "b c")]
    pairs = Dataset.from_list(rows * 2)
    run = dict(pair_loss="dpo", pairs=pairs, max_length=3)
    padded, _ = train(tiny_folder, tmp_path / "a", prefix_sharing="never", **run)
    shared, _ = train(tiny_folder, tmp_path / "b", prefix_sharing="always", **run)
    assert distance(shared, padded) <= 1e-4


@pytest.mark.slow
def test_cached_reference_values_are_told_apart(tiny_folder, tmp_path):
    # equal to rounding only, and `never` promises TRL's bits
    for setting in ("always", "never", "always"):
        build(
            tiny_folder,
            tmp_path / setting,
            precompute_ref_log_probs=True,
            ref_cache_dir=str(tmp_path / "cache"),
            prefix_sharing=setting,
        )
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2


@pytest.mark.slow
def test_the_references_window_counts_too(tmp_path, tiny_folder, said):
    narrow = tiny_model("mistral", sliding_window=48, seed=3)
    runs = {}
    for setting in ("never", "auto"):
        args = RobustDPOConfig(**settings(tmp_path / setting, pair_loss="dpo", prefix_sharing=setting, **ACCUMULATE))
        trainer = RobustDPOTrainer(tiny_folder, ref_model=narrow, args=args, train_dataset=make_pairs(8))
        trainer.train()
        runs[setting] = losses(trainer)
    assert runs["auto"] == pytest.approx(runs["never"], rel=1e-4)
    assert "longer than the sliding window of 48" in said()


@pytest.mark.slow
def test_what_else_the_model_is_given_pads_the_batch(tiny_folder, tmp_path, said):
    class WithPositions:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, rows):
            batch = self.inner(rows)
            batch["position_ids"] = torch.arange(batch["input_ids"].size(1)).expand_as(batch["input_ids"])
            return batch

    def with_positions(setting):
        trainer = build(tiny_folder, tmp_path / setting, prefix_sharing=setting)
        trainer.data_collator = WithPositions(trainer.data_collator)
        return trainer

    with_positions("auto").train()
    assert said().count("a batch is padded, not shared: it holds position_ids for the model") == 1
    with pytest.raises(ConfigError, match="a batch must be padded, as it holds position_ids"):
        with_positions("always").train()


@pytest.mark.slow
def test_pairs_stay_where_they_are_under_length_dependent_rotary_factors(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = save(tmp_path / "model", tiny_model(max_position_embeddings=32, rope_parameters=rope))
    runs = {}
    for setting in ("never", "always"):
        runs[setting], trainer = train(
            folder, tmp_path / setting, pair_loss="dpo", prefix_sharing=setting, **ACCUMULATE
        )
    assert trainer._sharing.active and not trainer._sharing.may_sort
    assert distance(runs["always"], runs["never"]) <= 1e-4


@pytest.mark.slow
def test_a_model_whose_code_trips_over_packed_rows_is_padded(tiny_folder, tmp_path, said, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    inner = LlamaModel.forward

    def forward(self, *args, attention_mask=None, position_ids=None, **kwargs):
        assert attention_mask is None or attention_mask.dim() == 2, "rows of my own"
        return inner(self, *args, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    train(tiny_folder, tmp_path / "a", pair_loss="dpo")
    assert "the model cannot run packed rows (AssertionError: rows of my own" in said()


def test_a_batch_is_packed_once_for_all_passes(tiny_folder, tmp_path, monkeypatch):
    from posttrain.mechanisms import prefix_sharing

    calls = []
    inner = prefix_sharing.pack_padded
    monkeypatch.setattr(prefix_sharing, "pack_padded", lambda *args, **given: calls.append(1) or inner(*args, **given))
    train(tiny_folder, tmp_path, reduction="dr_dpo", **ACCUMULATE)
    assert len(calls) == 2 * 2, "micro-batches, though each has two policy passes and one of the reference"


@pytest.mark.slow
def test_a_collator_that_pads_on_the_left_trains_the_same(tiny_folder, tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Left(DataCollatorForPreference):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            order = batch["attention_mask"].argsort(dim=1, stable=True)
            return {key: value.gather(1, order) if value.dim() == 2 else value for key, value in batch.items()}

    changes = []
    for side, collator in (("right", None), ("left", Left(pad_token_id=257))):
        run = dict(collator=collator, prefix_sharing="always", **ACCUMULATE)
        changes.append(train(tiny_folder, tmp_path / side, **run)[0])
    assert distance(*changes) <= 1e-4
