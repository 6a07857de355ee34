"""A run that goes on is the one that was interrupted: its reference, its quantisation, its precision, its folder."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig, GRPOConfig

from posttrain import (
    ALoLConfig,
    ALoLTrainer,
    PolicyGradientConfig,
    PolicyGradientTrainer,
    RobustDPOConfig,
    RobustDPOTrainer,
)
from posttrain.errors import ConfigError
from posttrain.mechanisms.base_digests import quantisation
from posttrain.mechanisms.precision import same_precision
from posttrain.models import byte_tokenizer, tiny_model
from posttrain.rewards.base import named_with_settings
from posttrain.rewards.maths import ExactMatch
from posttrain.run import checkpoints
from posttrain.run.checkpoint_files import MARKER, REFERENCE
from posttrain.run.identity import _UPDATE, differing, update_of
from tests import rollouts, scored
from tests.conftest import make_pairs
from tests.training import lora, settings, trainable


def build(model, out, peft=True, quantization_config=None, ref_model=None, **overrides):
    defaults = dict(pair_loss="dpo", max_steps=4, save_strategy="steps", save_steps=2, prefix_sharing="never")
    return RobustDPOTrainer(
        model,
        ref_model,
        args=RobustDPOConfig(**settings(out, **defaults | overrides)),
        train_dataset=make_pairs(32),
        peft_config=lora() if peft else None,
        quantization_config=quantization_config,
        processing_class=byte_tokenizer(),
    )


def other(shift=0.5, seed=1):
    model = tiny_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(shift * torch.randn(value.shape, generator=generator) * value.std())
    return model


def after(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    return trainable(trainer.model)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_reference_that_it_was_given(tiny_folder, tmp_path):
    out = tmp_path / "given"
    whole = after(build(tiny_folder, out, peft=False, ref_model=other()))
    checkpoint = str(out / "checkpoint-2")
    assert same(after(build(tiny_folder, out, peft=False, ref_model=other()), checkpoint), whole)
    half = other().to(torch.bfloat16)
    assert build(tiny_folder, out, peft=False, ref_model=half)._identity()["reference"]
    adapted = get_peft_model(other(), lora())
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.fill_(0.1)
    for given, named in (
        (None, "reference: a ref_model there, no ref_model here"),
        (other(seed=2), "reference: another ref_model there than here"),
        (adapted, "reference: another ref_model there than here"),
    ):
        with pytest.raises(ConfigError, match=named):
            build(tiny_folder, out, peft=False, ref_model=given)
        with pytest.raises(ConfigError, match=named):
            build(tiny_folder, tmp_path / "elsewhere", peft=False, ref_model=given).train(checkpoint)
    on = build(tiny_folder, out, peft=False, ref_model=other(seed=2), check_resume=False)
    assert not same(after(on, checkpoint), whole), "another reference is another run"


@pytest.mark.slow
def test_a_reference_that_comes_later_is_told_and_older_checkpoints_are_let_pass(tiny_folder, tmp_path):
    out = tmp_path / "plain"
    whole = after(build(tiny_folder, out))
    with pytest.raises(ConfigError, match="reference: no ref_model there, a ref_model here"):
        build(tiny_folder, out, ref_model=other())
    for marker in (out / "checkpoint-2" / MARKER, out / "checkpoint-4" / MARKER):
        content = json.loads(marker.read_text())
        assert content["identity"].pop("reference") is None and content["identity"].pop("quantisation") is None
        marker.write_text(json.dumps(content))
    assert same(after(build(tiny_folder, out), str(out / "checkpoint-2")), whole)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
def test_rollouts_under_another_reward_are_another_run(tiny_folder, tmp_path):
    def lengths(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    run = dict(data=rollouts.prompts([1, 2]), max_steps=1, gradient_accumulation_steps=2)
    rollouts.train(tiny_folder, tmp_path, save_strategy="steps", save_steps=1, **run)
    with pytest.raises(ConfigError, match=r"rewards: \['success.*'\] there, \['lengths.*'\] here"):
        rollouts.train(tiny_folder, tmp_path, reward=lengths, **run)


def test_a_reward_is_named_with_its_settings():
    plain, tagged = (named_with_settings("exact", ExactMatch(answer_in=place)) for place in ("auto", "tag"))
    assert plain != tagged and plain.startswith("exact ") and named_with_settings("own", len) == "own"


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_synced_reference_goes_on_as_it_was(tiny_folder, tmp_path, alpha):
    sync = dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=alpha)
    out = tmp_path / "synced"
    first = build(tiny_folder, out, peft=False, **sync)
    whole = after(first)
    checkpoint = out / "checkpoint-2"
    assert REFERENCE in json.loads((checkpoint / MARKER).read_text())["files"]
    second = build(tiny_folder, out, peft=False, **sync)
    begun = {name: value.clone() for name, value in second.ref_model.named_parameters()}
    assert same(after(second, str(checkpoint)), whole)
    ends = [dict(trainer.ref_model.named_parameters()) for trainer in (first, second)]
    assert same(*ends) and not same(ends[0], begun)
    (checkpoint / REFERENCE).unlink()
    with pytest.raises(ConfigError, match=f"{REFERENCE} is missing"):
        build(tiny_folder, out, peft=False, **sync).train(str(checkpoint))
    # written by a version that did not keep it
    content = json.loads((checkpoint / MARKER).read_text())
    del content["files"][REFERENCE]
    (checkpoint / MARKER).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="the run would go on with the reference that it began with.*check_resume"):
        build(tiny_folder, out, peft=False, **sync).train(str(checkpoint))
    lost = build(tiny_folder, out, peft=False, check_resume=False, **sync)
    assert not same(after(lost, str(checkpoint)), whole)


@pytest.mark.slow
def test_a_reference_that_stays_is_in_no_checkpoint(tiny_folder, tmp_path):
    build(tiny_folder, tmp_path / "still", peft=False, max_steps=2).train()
    assert not (tmp_path / "still/checkpoint-2" / REFERENCE).exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
def test_a_synced_reference_of_rollouts_goes_on_as_it_was(tiny_folder, tmp_path):
    def run(resume=None):
        trainer = PolicyGradientTrainer(
            tiny_folder,
            rollouts.success,
            PolicyGradientConfig(
                **rollouts.settings(
                    tmp_path / "out", max_steps=4, save_strategy="steps", save_steps=2, beta=0.2, learning_rate=0.05,
                    sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5,
                )
            ),
            rollouts.prompts([1, 3, 2, 2, 1, 3, 2, 1]),
            rollout_func=rollouts.rollouts,
        )  # fmt: skip
        return after(trainer, resume), dict(trainer.ref_model.named_parameters())

    whole, reference = run()
    resumed, again = run(str(tmp_path / "out/checkpoint-2"))
    assert same(resumed, whole) and same(again, reference)


@pytest.mark.parametrize(
    "change",
    [
        dict(truncation_mode="keep_end"),
        dict(loss_type="discopop", discopop_tau=0.1),
        dict(ld_alpha=0.5),
        dict(off_policy_mask_threshold=0.3),
        dict(reward_weights=[0.5]),
        dict(sapo_temperature_neg=1.2),
        dict(vespo_k_pos=3.0),
        dict(multi_objective_aggregation="normalize_then_sum"),
        dict(entropy_coef=0.01),
        dict(use_bias_correction_kl=True),
        dict(generation_kwargs={"num_beams": 2}),
        dict(vllm_importance_sampling_clip_max=2.5),
    ],
)
def test_a_setting_that_changes_the_updates_is_told(change, tmp_path):
    kind = DPOConfig if change.keys() & {"truncation_mode", "discopop_tau", "ld_alpha"} else GRPOConfig
    name = next(iter(change))
    before, now = (kind(str(tmp_path), use_cpu=True, bf16=False, report_to=[]) for _ in range(2))
    vars(before).update({name: None for name in change})
    vars(now).update(change)
    assert f"{name}: None there, {change[name]} here" in differing(update_of(now), update_of(before))


def test_every_setting_that_is_told_apart_is_one_of_a_config():
    from trl import DPOConfig, GRPOConfig, SFTConfig

    known = {
        field.name
        for config in (DPOConfig, GRPOConfig, SFTConfig, RobustDPOConfig)
        for field in dataclasses.fields(config)
    }
    assert set(_UPDATE) <= known


def four_bit(**changes):
    settings = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32) | changes
    return BitsAndBytesConfig(load_in_4bit=True, **settings)


@pytest.mark.slow
def test_an_adapter_on_a_4bit_base_goes_on_bit_for_bit_and_on_no_other_base(tiny_folder, tmp_path):
    out = tmp_path / "run"
    whole = after(build(tiny_folder, out, quantization_config=four_bit()))
    resumed = after(build(tiny_folder, out, quantization_config=four_bit()), str(out / "checkpoint-2"))
    assert {value.dtype for value in whole.values()} == {torch.bfloat16} and same(resumed, whole)
    for change, named in (
        (dict(bnb_4bit_quant_type="fp4"), "bnb_4bit_quant_type: nf4 there, fp4 here"),
        (dict(bnb_4bit_use_double_quant=True), "bnb_4bit_use_double_quant: False there, True here"),
        (dict(bnb_4bit_compute_dtype=torch.bfloat16), "bnb_4bit_compute_dtype: float32 there, bfloat16 here"),
    ):
        with pytest.raises(ConfigError, match=named):
            build(tiny_folder, tmp_path / "new", quantization_config=four_bit(**change)).train(
                str(out / "checkpoint-2")
            )
    with pytest.raises(ConfigError, match="quantisation: bitsandbytes there, None here"):
        build(tiny_folder, tmp_path / "new").train(str(out / "checkpoint-2"))


@pytest.mark.slow
def test_16_bit_adapters_go_on_in_16_bits(tiny_folder, tmp_path):
    def adapted():
        base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
        torch.manual_seed(0)
        return get_peft_model(base, lora(), autocast_adapter_dtype=False)

    out = tmp_path / "run"
    whole = after(build(adapted(), out, peft=False, check_reference=False))
    resumed = after(build(adapted(), out, peft=False, check_reference=False), str(out / "checkpoint-2"))
    assert {value.dtype for value in resumed.values()} == {torch.bfloat16} and same(resumed, whole)


def test_parameters_keep_their_precision_where_others_are_loaded(tiny_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = get_peft_model(base, lora()).to(torch.float16)
    model.save_pretrained(tmp_path)
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    with same_precision(model):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    for name, value in model.named_parameters():
        assert value.dtype == torch.float16 and torch.equal(value, values[name])
    assert isinstance(model, PeftModel)


def test_quantisation_is_known_by_what_rounds():
    class Model:
        def __init__(self, config):
            self.config = type("Config", (), {"quantization_config": config})()

    assert quantisation(Model(None)) == {"quantisation": None}
    one, two = (quantisation(Model(four_bit(bnb_4bit_quant_storage=kind))) for kind in ("uint8", "bfloat16"))
    assert one == two and one["bnb_4bit_quant_type"] == "nf4" and one["quantisation"] == "bitsandbytes"
    eight = quantisation(Model(BitsAndBytesConfig(load_in_8bit=True)))
    assert "load_in_8bit: False there, True here" in differing(eight, one)
    assert quantisation(Model({"quant_method": "gptq", "bits": 4})) == {"quantisation": "gptq", "bits": 4}


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("act", ["train", "evaluate", "save_model"])
def test_a_folder_that_another_run_took_meanwhile_is_refused(tiny_folder, tmp_path, act):
    out = tmp_path / "two"
    first, second = build(tiny_folder, out), build(tiny_folder, out, learning_rate=1e-3)
    first.train()
    before = files_of(out)
    with pytest.raises(ConfigError, match="checkpoints written by another run .learning_rate: 0.05 there, 0.001 here."):
        second.evaluate(make_pairs(4)) if act == "evaluate" else getattr(second, act)()
    assert files_of(out) == before
    first.evaluate(make_pairs(4))
    first.save_model()
    assert [checkpoints.step_of(folder) for folder in checkpoints.complete(out)] == [2, 4]


@pytest.mark.slow
def test_a_folder_that_another_run_took_may_be_taken_where_that_is_asked(tiny_folder, tmp_path):
    out = tmp_path / "two"
    first = build(tiny_folder, out)
    twin, bold = build(tiny_folder, out), build(tiny_folder, out, learning_rate=1e-3, overwrite=True)
    first.train()
    twin.train()
    bold.train()
    assert json.loads((out / "checkpoint-4" / MARKER).read_text())["update"]["learning_rate"] == 1e-3
    with pytest.raises(ConfigError, match="learning_rate: 0.001 there, 0.05 here"):
        build(tiny_folder, out)
    shutil.rmtree(out)
    build(tiny_folder, out).train()


@pytest.mark.slow
def test_answers_with_other_advantages_are_other_rows(tiny_folder, tmp_path):
    def digest(baseline):
        args = ALoLConfig(**scored.settings(tmp_path / str(baseline), value="column"))
        rows = scored.make_scored(8, baseline=[baseline] * 8)
        return ALoLTrainer(tiny_folder, args=args, train_dataset=rows)._identity()["data"]

    assert digest(0.1) == digest(0.1) != digest(0.2)


@pytest.mark.slow
def test_other_columns_named_as_reference_values_are_none(tiny_folder, tmp_path):
    def trained(name, rows, **overrides):
        trainer = RobustDPOTrainer(
            tiny_folder, None, args=RobustDPOConfig(**settings(tmp_path / name, max_steps=1, **overrides)),
            train_dataset=rows, peft_config=lora(),
        )  # fmt: skip
        return after(trainer), trainer._identity()

    plain, odd = make_pairs(8), make_pairs(8)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        odd = odd.add_column(name, [float(-i) for i in range(8)])
    for precompute in (False, True):
        one = trained(f"plain{precompute}", plain, precompute_ref_log_probs=precompute)
        other_one = trained(f"odd{precompute}", odd, precompute_ref_log_probs=precompute)
        assert same(one[0], other_one[0]) and one[1]["data"] == other_one[1]["data"]


@pytest.mark.slow
def test_the_order_of_rows_and_the_precision_are_the_runs(tiny_folder, tmp_path):
    def of(**overrides):
        trainer = build(tiny_folder, tmp_path, **overrides)
        return trainer._identity() | update_of(trainer.args)

    one = of()
    for overrides, told in (
        (dict(accelerator_config={"use_seedable_sampler": False}), "use_seedable_sampler: True there, False here"),
        (dict(model_init_kwargs={"dtype": "bfloat16"}), "dtype: float32 there, bfloat16 here"),
    ):
        assert told in differing(of(**overrides), one)
    # a checkpoint of before tells neither
    assert not differing(one, {k: v for k, v in one.items() if k not in ("dtype", "use_seedable_sampler")})


def test_another_chat_template_makes_other_prompts(tmp_path):
    def of(template):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template or tokenizer.chat_template
        args = PolicyGradientConfig(**rollouts.settings(tmp_path))
        trainer = PolicyGradientTrainer(
            tiny_model(),
            rollouts.success,
            args,
            train_dataset=rollouts.prompts([1, 2, 3, 0]),
            processing_class=tokenizer,
        )
        return trainer._identity()

    assert not differing(of(None), of(None))
    assert "chat_template: " in differing(of("{{ messages[0].content }}"), of(None))
