"""ALLoRA in every family's trainer, and in TRL's own: its update, its log, resumption, and what is refused."""

import json
import re

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from posttrain import (
    ALoLConfig,
    ALoLTrainer,
    NoisySFTConfig,
    NoisySFTTrainer,
    QAETrainer,
    RobustDPOConfig,
    RobustDPOTrainer,
)
from posttrain.adapters.allora import ALLoRAConfig, apply_allora, layers_of
from posttrain.errors import ConfigError
from posttrain.objectives.row_scales import allora_scale, row_norms
from posttrain.run import adapter_schemes
from posttrain.run.identity import identity
from posttrain.run.row_scales import keeps_the_size
from tests import rollouts, scored, training
from tests.conftest import make_pairs
from tests.runs import PARENT, distance, entries, fit, identical, lora, trainable

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
    pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning"),
]
NAMES = ("allora/scale_min", "allora/scale_mean", "allora/scale_max", "allora/row_norm_mean")


def adapter(**settings) -> ALLoRAConfig:
    return ALLoRAConfig(**dict(r=4, target_modules="all-linear") | settings)


def plain(**settings) -> LoraConfig:
    """The LoRA that has the same forward."""
    return lora(lora_alpha=4, **settings)


def on_pairs(folder, output_dir, config=None, **settings):
    args = RobustDPOConfig(**training.settings(output_dir, **settings))
    return RobustDPOTrainer(folder, args=args, train_dataset=make_pairs(16), peft_config=config or adapter())


def on_answers(folder, output_dir, config=None, **settings):
    fields = dict(variant="a_lol", value="column", value_column="baseline", learning_rate=0.05) | settings
    rows = scored.make_scored(16, baseline=[-0.1] * 16)
    args = ALoLConfig(**scored.settings(output_dir, **fields))
    return ALoLTrainer(folder, args=args, train_dataset=rows, peft_config=config or adapter())


def on_rollouts(folder, output_dir, config=None, **settings):
    args = rollouts.PRESETS["qae"][1](**rollouts.settings(output_dir, **settings))
    return QAETrainer(
        folder, rollouts.success, args, rollouts.prompts([1, 0, 4, 2]), peft_config=config or adapter(),
        rollout_func=rollouts.rollouts,
    )  # fmt: skip


def instructions(output_dir, **settings):
    fields = scored.settings(output_dir, **dict(learning_rate=0.2) | settings)
    del fields["prefix_sharing"]
    return fields


def on_instructions(folder, output_dir, config=None, **settings):
    rows = scored.make_scored(16).remove_columns("reward")
    args = NoisySFTConfig(**instructions(output_dir, **settings))
    return NoisySFTTrainer(folder, args=args, train_dataset=rows, peft_config=config or adapter())


FAMILIES = {"pairs": on_pairs, "answers": on_answers, "rollouts": on_rollouts, "instructions": on_instructions}


# of the core suite tests/contract has one
@pytest.mark.slow
@pytest.mark.parametrize("form", ["gradient", "update"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(family, form, tiny_folder, tmp_path):
    build = FAMILIES[family]
    run = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2)
    _, straight = fit(build(tiny_folder, tmp_path, adapter(form=form), **run))
    again = build(tiny_folder, tmp_path, adapter(form=form), **run | dict(save_strategy="no"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert identical(trainable(again.model), trainable(straight.model))
    ours, theirs = ([[row[name] for name in NAMES] for row in entries(trainer)] for trainer in (again, straight))
    assert ours == theirs and len({tuple(row) for row in ours}) == 4


@pytest.mark.core("lora-allora")
@pytest.mark.parametrize("now", ["lora", "allora", "eta", "update"])
@pytest.mark.parametrize("before", ["lora", "allora"])
def test_an_adapter_of_another_scheme_or_eta_is_not_resumed(before, now, tiny_folder, tmp_path):
    kinds = {"lora": plain(), "allora": adapter(), "eta": adapter(eta=3.0), "update": adapter(form="update")}
    run = dict(max_steps=1, save_strategy="steps", save_steps=1)
    on_instructions(tiny_folder, tmp_path, kinds[before], **run).train()
    told = {"lora": "None", "allora": "allora eta 2.0, gradient form"}[before]
    again = on_instructions(tiny_folder, tmp_path / now, kinds[now], **run | dict(max_steps=2))
    checkpoint = str(tmp_path / "checkpoint-1")
    if now == before:
        again.train(resume_from_checkpoint=checkpoint)
        return
    with pytest.raises(ConfigError, match=f"adapter_scheme: {told} there"):
        again.train(resume_from_checkpoint=checkpoint)
    # and it does not write over that run
    with pytest.raises(ConfigError, match=f"adapter_scheme: {told} there"):
        on_instructions(tiny_folder, tmp_path, kinds[now], **run)


@pytest.mark.slow
def test_a_checkpoint_of_a_version_without_schemes_is_one_of_a_plain_adapter(tiny_folder, tmp_path):
    from posttrain.run.markers import MARKER

    run = dict(max_steps=1, save_strategy="steps", save_steps=1)
    on_instructions(tiny_folder, tmp_path, plain(), **run).train()
    for path in (tmp_path / "checkpoint-1" / MARKER, tmp_path / "posttrain_run.json"):
        found = json.loads(path.read_text())
        del found["identity"]["adapter_scheme"]
        path.write_text(json.dumps(found))
    on_instructions(tiny_folder, tmp_path, plain(), **run).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="adapter_scheme: None there, allora eta 2.0"):
        on_instructions(tiny_folder, tmp_path, **run)


def test_its_factors_are_in_the_log_of_the_steps_that_have_one(tiny_folder, tmp_path, monkeypatch):
    from posttrain.run import row_scales

    computed = []
    monkeypatch.setattr(row_scales, "row_norms", lambda *given: computed.append(0) or row_norms(*given))
    trainer = on_instructions(tiny_folder, tmp_path, max_steps=4, logging_steps=2)
    trainer.train()
    matrices = [
        (layer.lora_A[name].weight, layer.lora_B[name].weight) for _, layer, _, name in layers_of(trainer.model)
    ]
    assert len(computed) == 2 * len(matrices) and len(entries(trainer)) == 2
    scales, norms = (torch.cat([of(*pair) for pair in matrices]) for of in (
        lambda A, B: allora_scale(A, B, 2.0), lambda A, B: (B.double() @ A.double()).norm(dim=1)))  # fmt: skip
    expected = [scales.min(), scales.mean(), scales.max(), norms.detach().mean()]
    assert [entries(trainer)[-1][name] for name in NAMES] == pytest.approx([float(value) for value in expected])
    assert scales.min() < scales.mean() < scales.max() <= 2.0
    assert [name for name in entries(on_and_trained(tiny_folder, tmp_path / "b"))[0] if "allora" in name] == []


def on_and_trained(folder, output_dir):
    trainer = on_instructions(folder, output_dir, plain(), max_steps=1)
    trainer.train()
    return trainer


@pytest.mark.core("adamw_torch-gradient", "sgd")
@pytest.mark.parametrize(
    ("optim", "form", "count"),
    [("adamw_torch", "gradient", 1), ("sgd", "gradient", 0), ("rmsprop", "gradient", 1), ("adamw_torch", "update", 0)],
)
def test_an_optimizer_that_undoes_it_is_warned_of(optim, form, count, tiny_folder, tmp_path, logged):
    said = "nearly undoes the factors of its rows"
    on_instructions(tiny_folder, tmp_path, adapter(form=form), optim=optim, max_steps=1).train()
    assert logged.text.count(said) == count and (not count or f"with optim {optim}: " in logged.text)


@pytest.mark.slow
def test_an_optimizer_that_is_given_is_named_by_its_class(tiny_folder, tmp_path, logged):
    rows = scored.make_scored(8).remove_columns("reward")
    for kind, count in ((torch.optim.SGD, 0), (torch.optim.Adagrad, 1)):
        logged.clear()
        args = NoisySFTConfig(**instructions(tmp_path / kind.__name__, max_steps=1, optim="adamw_torch"))
        NoisySFTTrainer(
            tiny_folder, args=args, train_dataset=rows, peft_config=adapter(),
            optimizer_cls_and_kwargs=(kind, dict(lr=0.1)),
        ).train()  # fmt: skip
        assert logged.text.count("nearly undoes") == count and (not count or "with optim Adagrad: " in logged.text)


@pytest.mark.slow
def test_trls_own_trainer_makes_the_same_update(tiny_folder, tmp_path, logged):
    rows = scored.make_scored(16).remove_columns("reward")

    def parent(name, config):
        args = SFTConfig(**instructions(tmp_path / name, max_steps=3) | PARENT)
        return fit(SFTTrainer(tiny_folder, args=args, train_dataset=rows, peft_config=config))

    ours, _ = fit(on_instructions(tiny_folder, tmp_path / "ours", max_steps=3))
    theirs, trainer = parent("trl", adapter())
    assert identical(ours, theirs)
    trainer.save_model(str(tmp_path / "saved"))
    assert ALLoRAConfig.from_pretrained(tmp_path / "saved").eta == 2.0
    without, _ = parent("lora", plain())
    assert distance(ours, without) > 0.1
    # the update form has no effect there, and says so
    logged.clear()
    update, _ = parent("update", adapter(form="update"))
    assert identical(update, without) and logged.text.count("nothing scales the updates of an optimizer here") == 1
    scaled, _ = fit(on_instructions(tiny_folder, tmp_path / "scaled", adapter(form="update"), max_steps=3))
    assert distance(scaled, without) > 0.1 and distance(scaled, ours) > 1e-4


@pytest.mark.slow
def test_the_first_step_of_sgd_is_the_same_in_both_forms(tiny_folder, tmp_path):
    run = dict(max_steps=1)
    ours, _ = fit(on_instructions(tiny_folder, tmp_path / "gradient", **run))
    update, _ = fit(on_instructions(tiny_folder, tmp_path / "update", adapter(form="update"), **run))
    # A has no gradient while B is zero
    assert distance(update, ours) < 1e-6


@pytest.mark.slow
def test_trls_own_trainer_of_pairs_makes_the_same_update(tiny_folder, tmp_path):
    run = dict(max_steps=3)
    ours, _ = fit(on_pairs(tiny_folder, tmp_path / "ours", prefix_sharing="never", **run))
    args = DPOConfig(**training.settings(tmp_path / "trl", **run) | PARENT)
    theirs, _ = fit(DPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(16), peft_config=adapter()))
    assert identical(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_reference_between_forward_and_recomputation_changes_nothing(reentrant, tiny_folder, tmp_path):
    reference, _ = fit(on_pairs(tiny_folder, tmp_path / "a", max_steps=3))
    run = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    change, _ = fit(on_pairs(tiny_folder, tmp_path / "b", max_steps=3, **run))
    assert distance(change, reference) < 1e-5


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_a_trained_adapter_that_is_given_is_trained_on_with_its_reference(tiny_folder, tmp_path):
    first = on_instructions(tiny_folder, tmp_path / "a", adapter(eta=3.0), max_steps=3)
    first.train()
    first.save_model(str(tmp_path / "saved"))
    config = ALLoRAConfig.from_pretrained(tmp_path / "saved")
    changes = []
    for name, given in (("as one", config), ("made one", None)):
        model = PeftModel.from_pretrained(loaded(tiny_folder), tmp_path / "saved", config=given, is_trainable=True)
        if given is None:
            apply_allora(model, 3.0)
        args = RobustDPOConfig(**training.settings(tmp_path / name))
        trainer = RobustDPOTrainer(
            model, args=args, train_dataset=make_pairs(16), processing_class=first.processing_class
        )
        # the first step is checked against the reference, a copy of the adapter
        changes.append(fit(trainer)[0])
        assert trainer._margin_checked and identity(trainer)["adapter_scheme"].startswith("allora eta 3.0")
        assert {adapter for *_, adapter in layers_of(trainer.model)} == {"default", "ref"}
    assert identical(*changes)


def test_an_adapter_on_layers_that_have_another_is_made_one(tiny_folder, tmp_path):
    model = get_peft_model(loaded(tiny_folder), plain(), adapter_name="other")
    torch.manual_seed(7)
    model.add_adapter("default", adapter())
    model.set_adapter("default")
    # PEFT puts a plain one there
    assert not layers_of(model)
    rows = scored.make_scored(16).remove_columns("reward")
    args = NoisySFTConfig(**instructions(tmp_path, max_steps=1))
    trainer = NoisySFTTrainer(
        model, args=args, train_dataset=rows, processing_class=on_instructions(tiny_folder, tmp_path).processing_class
    )
    trainer.train()
    assert len(layers_of(trainer.model, "default")) == 14 and NAMES[0] in entries(trainer)[0]


def test_one_that_is_merged_is_not_trained(tiny_folder, tmp_path):
    trainer = on_instructions(tiny_folder, tmp_path)
    trainer.model.merge_adapter()
    with pytest.raises(ConfigError, match="adapter allora is merged into the base .*q_proj.*unmerge_adapter"):
        trainer.train()
    trainer.model.unmerge_adapter()
    trainer.train()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(weight_decay=0.1), "weight_decay is 0.1 with allora's form update"),
        (dict(optim="lomo"), "optim is lomo with allora's form update"),
        (dict(optim="galore_adamw_layerwise"), "optim is galore_adamw_layerwise with allora's form update"),
        (dict(fsdp="full_shard"), "allora's form is update under FSDP"),
        (dict(deepspeed="ds.json"), "allora's form is update under DeepSpeed"),
    ],
)
def test_updates_that_cannot_be_scaled_are_refused(settings, said):
    from types import SimpleNamespace

    args = SimpleNamespace(**dict(weight_decay=0.0, optim="sgd", fsdp=None, deepspeed=None) | settings)
    with pytest.raises(ConfigError, match=said):
        adapter_schemes.check(adapter(form="update"), args)
    adapter_schemes.check(adapter(), args)
    adapter_schemes.check(plain(), args)


@pytest.mark.slow
def test_an_optimizer_without_hooks_is_noticed(tiny_folder, tmp_path, monkeypatch):
    trainer = on_instructions(tiny_folder, tmp_path, adapter(form="update"))
    monkeypatch.setattr(
        "posttrain.adapters.scaled_updates.ScaledUpdates._end", lambda self, *args: setattr(self, "_before", [])
    )
    with pytest.raises(ConfigError, match="steps without the hooks of torch's"):
        trainer.train()


def test_the_scheme_is_in_the_identity_the_card_and_the_settings(tiny_folder, tmp_path):
    trainer = on_instructions(tiny_folder, tmp_path, adapter(eta=1.5))
    assert identity(trainer)["adapter_scheme"] == "allora eta 1.5, gradient form"
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) +\| +(.+?) +\|$", card, re.MULTILINE))
    assert (rows["adapter"], rows["eta"], rows["optim"]) == ("allora", "1.5", "sgd")
    assert rows["a row's factor multiplies"] == "the gradients of A and B"
    assert "2410.09692" in card and "huang2024allora" in card
    assert "optim" in yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())["training"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "rate", "form", "low", "high"),
    [
        ("sgd", 0.02, "gradient", 0.5, 2.0),
        ("adamw_torch", 1e-3, "gradient", 0.0, 0.03),
        ("adamw_torch", 1e-3, "update", 0.5, 1.5),
    ],
)
def test_adam_nearly_undoes_the_gradient_form(optim, rate, form, low, high, tiny_folder, tmp_path):
    """The change of B in 20 steps, against a plain LoRA's with the same optimizer: as the figures of the page."""
    run = dict(max_steps=20, optim=optim, learning_rate=rate)
    plainly, _ = fit(on_instructions(tiny_folder, tmp_path / "lora", plain(), **run))
    change, _ = fit(on_instructions(tiny_folder, tmp_path / "allora", adapter(form=form), **run))
    ours, theirs = ({n: v for n, v in found.items() if "lora_B" in n} for found in (change, plainly))
    assert low < distance(ours, theirs) < high, distance(ours, theirs)


@pytest.mark.parametrize("name", ["signsgd", "sgdsai", "dadaptsgd", "vsgd", "asgd", "adalomo", "swats", "Adam"])
def test_a_name_like_sgds_is_not_taken_for_one_that_keeps_the_size(name):
    assert not keeps_the_size("pytorch_optimizer", name)
    assert not keeps_the_size("", name)


@pytest.mark.parametrize("name", ["accsgd", "aggmo", "pid", "qhm", "schedulefreesgd", "sgd", "sgdw"])
def test_those_that_keep_the_size_are_linear_in_the_gradients(name):
    optimizers = pytest.importorskip("pytorch_optimizer")
    kind = optimizers.load_optimizer(name)
    assert keeps_the_size("pytorch_optimizer", name) and keeps_the_size(kind.__module__, kind.__name__)
    changes = []
    for size in (1.0, 3.0):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        optimizer = kind([weight], lr=1e-2)
        for _ in range(4):
            weight.grad = size * torch.randn(4, 3, dtype=torch.float64)
            optimizer.step()
        changes.append(weight.detach().clone())
    assert changes[0].any() and torch.allclose(changes[1], 3 * changes[0], rtol=1e-9, atol=0)


def test_names_that_keep_the_size_are_told_by_their_package():
    assert keeps_the_size(torch.optim.ASGD.__module__, "ASGD") and keeps_the_size("torch.optim", "SGD")
    assert keeps_the_size("", "sgd") and keeps_the_size("", "lomo") and not keeps_the_size("mine", "SGD")


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("names", ["embed_tokens", [], ["nope"]])
def test_target_modules_that_name_no_layer_are_refused(names, loaded, tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder) if loaded else tiny_folder
    args = NoisySFTConfig(**instructions(tmp_path))
    rows = scored.make_scored(8).remove_columns("reward")
    with pytest.raises(ConfigError, match="target_modules|Target modules"):
        NoisySFTTrainer(
            model, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(tiny_folder),
            peft_config=ALLoRAConfig(r=4, target_modules=names),
        )  # fmt: skip
