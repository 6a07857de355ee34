import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import EnvironmentIssue
from posttrain.mechanisms.sequence_cache import ReferenceCache, forwarded, sequence_digest
from posttrain.models import tiny_model
from tests.conftest import make_pairs
from tests.training import distance, lora, settings, train


def build(folder, tmp_path, pairs=None, peft_config="lora", model=None, **overrides):
    return RobustDPOTrainer(
        model if model is not None else folder,
        args=RobustDPOConfig(**settings(tmp_path / "out", **overrides)),
        train_dataset=pairs if pairs is not None else make_pairs(8),
        peft_config=lora() if peft_config == "lora" else None,
        processing_class=overrides.pop("processing_class", None),
    )


@pytest.fixture
def forwards(monkeypatch):
    """The number of batches whose reference was forwarded."""
    calls = []
    original = RobustDPOTrainer.compute_ref_log_probs

    def counted(self, model, inputs):
        calls.append(inputs["input_ids"].size(0) // 2)
        return original(self, model, inputs)

    monkeypatch.setattr(RobustDPOTrainer, "compute_ref_log_probs", counted)
    return calls


def swapped(pairs):
    return Dataset.from_list([{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs])


@pytest.mark.slow
def test_a_second_run_and_a_flipped_set_need_no_reference_forward(tiny_folder, tmp_path, forwards):
    pairs = make_pairs(8)
    first = build(tiny_folder, tmp_path, pairs, precompute_ref_log_probs=True)
    assert sum(forwards) == 8
    again = build(tiny_folder, tmp_path, pairs, precompute_ref_log_probs=True, per_device_train_batch_size=3)
    flipped = build(tiny_folder, tmp_path, swapped(pairs), precompute_ref_log_probs=True)
    assert sum(forwards) == 8
    assert again.train_dataset["ref_chosen_logps"][:] == first.train_dataset["ref_chosen_logps"][:]
    assert flipped.train_dataset["ref_rejected_logps"][:] == first.train_dataset["ref_chosen_logps"][:]
    build(tiny_folder, tmp_path, make_pairs(10), precompute_ref_log_probs=True)
    assert sum(forwards) == 10, "only the rows that the cache lacks"


def test_values_computed_before_an_error_are_kept_and_a_cache_that_cannot_be_written_is_told_before_any(
    tiny_folder, tmp_path, forwards, monkeypatch
):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentIssue, match="the cache .*file.* cannot be written.*ref_cache_dir"):
        build(tiny_folder, tmp_path, precompute_ref_log_probs=True, ref_cache_dir=str(tmp_path / "file" / "cache"))
    assert not forwards
    counted = RobustDPOTrainer.compute_ref_log_probs

    def interrupted(self, model, inputs):
        if sum(forwards) >= 4:
            raise KeyboardInterrupt
        return counted(self, model, inputs)

    monkeypatch.setattr(RobustDPOTrainer, "compute_ref_log_probs", interrupted)
    sizes = dict(precompute_ref_log_probs=True, precompute_ref_batch_size=2, ref_cache_dir=str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        build(tiny_folder, tmp_path, **sizes)
    assert sum(forwards) == 4
    monkeypatch.setattr(RobustDPOTrainer, "compute_ref_log_probs", counted)
    whole = build(tiny_folder, tmp_path, **sizes)
    assert sum(forwards) == 8, "the first four are known"
    other = build(tiny_folder, tmp_path, **sizes | {"ref_cache_dir": str(tmp_path / "other")})
    assert whole.train_dataset["ref_chosen_logps"][:] == other.train_dataset["ref_chosen_logps"][:]


@pytest.mark.core("weights", "rope")
@pytest.mark.parametrize("change", ["weights", "max_length", "ld_alpha", "rope", "precision"])
def test_whatever_affects_a_reference_value_is_in_its_key(tiny_folder, tmp_path, forwards, change):
    build(tiny_folder, tmp_path, precompute_ref_log_probs=True)
    overrides = {
        "max_length": dict(max_length=30),
        "ld_alpha": dict(ld_alpha=0.3),
        "precision": dict(bf16=True),
    }
    model = None
    if change in ("weights", "rope"):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        if change == "weights":
            model.lm_head.weight.data[0, 0] += 1e-3
        else:
            model.config.rope_parameters["rope_theta"] = 5000.0
    build(tiny_folder, tmp_path, model=model, precompute_ref_log_probs=True, **overrides.get(change, {}))
    assert sum(forwards) > 8


@pytest.mark.slow
def test_the_adapters_seed_is_not_in_the_key(tiny_folder, tmp_path, forwards):
    build(tiny_folder, tmp_path, precompute_ref_log_probs=True, seed=1)
    build(tiny_folder, tmp_path, precompute_ref_log_probs=True, seed=2)
    assert sum(forwards) == 8


@pytest.mark.slow
def test_a_cached_reference_trains_like_a_live_one(tiny_folder, tmp_path):
    live, _ = train(tiny_folder, tmp_path, reduction="dr_dpo", beta_prime=0.3)
    cold, _ = train(tiny_folder, tmp_path, reduction="dr_dpo", beta_prime=0.3, precompute_ref_log_probs=True)
    warm, _ = train(tiny_folder, tmp_path, reduction="dr_dpo", beta_prime=0.3, precompute_ref_log_probs=True)
    assert distance(cold, live) <= 1e-4
    assert all(torch.equal(warm[name], cold[name]) for name in cold)


@pytest.mark.slow
def test_precompute_leaves_the_global_random_state_alone(tiny_folder, tmp_path):
    build(tiny_folder, tmp_path, precompute_ref_log_probs=True)
    warm = torch.random.get_rng_state()
    build(tiny_folder, tmp_path, precompute_ref_log_probs=True)
    cold_cache = tmp_path / "other"
    after_warm = torch.random.get_rng_state()
    build(tiny_folder, tmp_path, precompute_ref_log_probs=True, ref_cache_dir=str(cold_cache))
    assert torch.equal(warm, after_warm) and torch.equal(torch.random.get_rng_state(), after_warm)
    assert list(cold_cache.glob("*.safetensors"))


def test_an_unreadable_cache_is_written_anew(tmp_path, caplog):
    cache = ReferenceCache(tmp_path, "key")
    digest = sequence_digest([1, 2], [3], None)
    cache.add({digest: -1.25})
    assert cache.load() == {digest: -1.25}
    cache.path.write_bytes(b"not a safetensors file")
    assert cache.load() == {}
    cache.add({digest: -2.5})
    assert cache.load() == {digest: -2.5}
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"key.safetensors", "key.safetensors.damaged1"}
    assert not list(tmp_path.glob(".*.partial")), "no partial file is left"


def test_sequence_digests_see_the_boundary_and_the_cut():
    assert sequence_digest([1, 2], [3], None) != sequence_digest([1], [2, 3], None)
    assert sequence_digest([1, 2], [3, 4], 3) == sequence_digest([1, 2], [3, 9], 3)
    assert sequence_digest([1, 2], [3, 4], 4) != sequence_digest([1, 2], [3, 9], 4)


@pytest.mark.slow
def test_the_reference_of_a_trained_adapter_is_that_adapter(tiny_folder, tmp_path, tokenizer):
    change, trained = train(tiny_folder, tmp_path / "first", pair_loss="dpo")
    trained.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter", is_trainable=True
    )
    trainer = RobustDPOTrainer(
        model,
        args=RobustDPOConfig(**settings(tmp_path / "second", pair_loss="dpo", max_steps=1)),
        train_dataset=make_pairs(8),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert "ref" in trainer.model.peft_config


def test_a_wrong_reference_stops_the_run_before_the_first_step(tiny_folder, tmp_path, tokenizer):
    # the base changed under the adapter after it was built: the adapter is no longer the identity at step 0
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), lora())
    trainer = RobustDPOTrainer(
        model,
        args=RobustDPOConfig(**settings(tmp_path, pair_loss="dpo")),
        train_dataset=make_pairs(8),
        processing_class=tokenizer,
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="policy and reference differ by .* nats per token before the first step"):
        trainer.train()


@pytest.mark.slow
def test_a_model_changed_after_loading_is_told_apart_from_its_folder(tiny_folder, tmp_path, tokenizer):
    def changed():
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        model.lm_head.weight.data.mul_(1.5)
        return model

    arguments = dict(train_dataset=make_pairs(8), processing_class=tokenizer)
    args = settings(tmp_path, pair_loss="dpo", max_steps=1)
    with pytest.raises(ValueError, match="The reference is: the model as loaded from"):
        RobustDPOTrainer(changed(), args=RobustDPOConfig(**args), **arguments).train()
    RobustDPOTrainer(changed(), args=RobustDPOConfig(**args, check_reference=False), **arguments).train()
    given = RobustDPOTrainer(changed(), tiny_model(), args=RobustDPOConfig(**args), **arguments)
    given.train()
    assert given.state.global_step == 1


@pytest.mark.parametrize("given", ["name", "model"])
def test_attention_dropout_is_refused_before_the_model_loads(tiny_folder, tmp_path, given, monkeypatch, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attention_dropout=0.1)
    if given == "name":
        model.save_pretrained(tmp_path / "dropout")
        monkeypatch.setattr(
            AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded")
        )
        model = str(tmp_path / "dropout")
    with pytest.raises(ValueError, match="attention_dropout is 0.1; policy and reference would differ by chance"):
        RobustDPOTrainer(
            model,
            args=RobustDPOConfig(str(tmp_path)),
            train_dataset=make_pairs(4),
            processing_class=tokenizer,
        )


def test_an_unknown_model_is_answered_without_a_traceback_of_the_hub(tmp_path):
    with pytest.raises(EnvironmentIssue, match="model 'no-such-org/no-such-model' is no folder here and not in"):
        RobustDPOTrainer("no-such-org/no-such-model", args=RobustDPOConfig(str(tmp_path)), train_dataset=make_pairs(4))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (
            ["rejected"],
            "train_dataset has no column rejected. Found: prompt, chosen. Needed: chosen, rejected",
        ),
        (["chosen", "rejected"], "train_dataset has no column chosen and rejected. Found: prompt. Needed: chosen,"),
    ],
)
def test_missing_columns_are_named(tiny_folder, tmp_path, drop, message):
    with pytest.raises(ValueError) as error:
        build(tiny_folder, tmp_path, make_pairs(4).remove_columns(drop))
    assert message in str(error.value)


@pytest.mark.slow
def test_rows_that_are_tokenised_already_train_alike(tiny_folder, tmp_path):
    change, trainer = train(tiny_folder, tmp_path / "text", pair_loss="dpo")
    tokens = trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    same, _ = train(tiny_folder, tmp_path / "tokens", pairs=tokens, pair_loss="dpo")
    assert all(torch.equal(same[name], change[name]) for name in change)
    lengths = sorted(len(ids) for ids in tokens["prompt_ids"])
    cut = build(tiny_folder, tmp_path, tokens, max_length=lengths[-1])
    assert len(cut.train_dataset) == sum(length < lengths[-1] for length in lengths) > 0


def test_a_bad_rate_in_the_flip_rate_column_is_found_before_training(tiny_folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"train_dataset has a flip_rate of 0.6 in row 2; every row's flip_rate must lie in"
    ):
        build(tiny_folder, tmp_path, make_pairs(4, flip_rate=[0.1, 0.6, 0.2, 0.0]), pair_loss="rdpo")


def test_settings_of_another_trainer_are_refused(tiny_folder, tmp_path):
    from trl import KTOConfig

    args = KTOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args is a KTOConfig; it must be a posttrain.RobustDPOConfig"):
        RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_precomputed_values_are_trls_for_either_end_that_is_kept(tiny_folder, tmp_path, mode, ld_alpha):
    rows = make_pairs(12).map(
        lambda row, i: {"prompt": [{"role": "user", "content": "hi" * (1 + 3 * i)}]}, with_indices=True
    )
    cut = dict(max_length=36, truncation_mode=mode, ld_alpha=ld_alpha, precompute_ref_log_probs=True)
    upstream = DPOTrainer(
        tiny_folder,
        args=DPOConfig(
            **settings(tmp_path / "trl", **cut),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=rows,
        peft_config=lora(),
    )
    # the other mode's values lie in the cache before
    other = "keep_end" if mode == "keep_start" else "keep_start"
    build(tiny_folder, tmp_path, rows, **cut | {"truncation_mode": other})
    ours = build(tiny_folder, tmp_path, rows, **cut)
    assert len(ours.train_dataset) == len(upstream.train_dataset) >= 3
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        expected = torch.tensor(upstream.train_dataset[column][:])
        torch.testing.assert_close(torch.tensor(ours.train_dataset[column][:]), expected, atol=1e-3, rtol=1e-5)
    if mode == "keep_end":
        gaps = [
            abs(row["ref_chosen_logps"] - row["ref_rejected_logps"])
            for row in ours.train_dataset
            if len(row["prompt_ids"]) > 36
        ]
        assert len(gaps) >= 3 and min(gaps) > 0.01, "two answers to a long prompt are two sequences"


def test_a_sequence_is_known_by_the_tokens_that_the_cut_leaves():
    prompt, answer = [1, 2, 3], [4, 5]
    assert forwarded(prompt, answer, None) == ([1, 2, 3, 4, 5], 3)
    assert forwarded(prompt, answer, 5, True) == ([1, 2, 3, 4, 5], 3)
    assert forwarded(prompt, answer, 3) == ([1, 2, 3], 3)
    assert forwarded(prompt, answer, 3, True) == ([3, 4, 5], 1)
    assert forwarded(prompt, answer, 2, True) == ([4, 5], 0)
    assert forwarded(prompt, answer, 1, True) == ([5], 0)
    first, second = ([1, 2, 3, 4], [5]), ([1, 2, 3, 4], [6])
    assert sequence_digest(*first, 3) == sequence_digest(*second, 3)
    assert sequence_digest(*first, 3, keep_end=True) != sequence_digest(*second, 3, keep_end=True)
    assert sequence_digest([9, 3, 4], [5], 2, keep_end=True) == sequence_digest([8, 3, 4], [5], 2, keep_end=True)
    assert sequence_digest([3, 4], [5], 2, keep_end=True) != sequence_digest([3], [4, 5], 2, keep_end=True)


@pytest.mark.core("keep_end")
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("first", ["keep_start", "keep_end"])
def test_values_of_one_end_are_not_served_to_the_other(tiny_folder, tmp_path, forwards, first):
    second = "keep_end" if first == "keep_start" else "keep_start"
    for mode in (first, second):
        build(tiny_folder, tmp_path, make_pairs(8), precompute_ref_log_probs=True, truncation_mode=mode)
    assert sum(forwards) == 16
