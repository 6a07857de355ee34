"""The check that the policy starts as its reference, in bf16, where rounding of a short answer does not average out."""

import random
import types

import pytest
import torch
from datasets import Dataset

from posttrain import (
    ALoLConfig,
    ALoLTrainer,
    PolicyGradientConfig,
    PolicyGradientTrainer,
    RobustDPOConfig,
    RobustDPOTrainer,
)
from posttrain.errors import ConfigError
from posttrain.models import tiny_model
from posttrain.run import reference
from tests import rollouts, runs, scored, training

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
FAMILIES = ("preference", "offline", "policy_gradient")


def _text(rng, length) -> str:
    return "".join(rng.choice("abcdefgh ") for _ in range(length))


def _sharp():
    """A model in bf16 whose log-probs spread as those of a trained one do, and are rounded as coarsely."""
    model = tiny_model(initializer_range=0.4)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model.to(torch.bfloat16)


def build(family, folder, tokenizer, rows: int = 64, **settings):
    """A trainer whose reference was forwarded in other batches than the policy will be; answers of 1 to 4 tokens."""
    rng = random.Random(0)
    prompts = [_text(rng, rng.randint(5, 40)) for _ in range(rows)]
    given = dict(peft_config=runs.lora(), processing_class=tokenizer)
    fields = dict(per_device_train_batch_size=32, max_steps=1, bf16=False) | settings
    if family == "preference":
        pairs = [
            {"prompt": prompt, "chosen": _text(rng, rng.randint(1, 3)), "rejected": _text(rng, rng.randint(1, 3))}
            for prompt in prompts
        ]
        fields = training.settings(folder, precompute_ref_log_probs=True, precompute_ref_batch_size=3, **fields)
        args = RobustDPOConfig(**fields)
        return RobustDPOTrainer(_sharp(), args=args, train_dataset=Dataset.from_list(pairs), **given)
    if family == "offline":
        answers = [
            {"prompt": prompt, "completion": _text(rng, rng.randint(1, 3)), "reward": 0.5 + rng.random() / 2}
            for prompt in prompts
        ]
        fields = scored.settings(folder, per_device_eval_batch_size=3, variant="a_lol", **fields)
        return ALoLTrainer(_sharp(), args=ALoLConfig(**fields), train_dataset=Dataset.from_list(answers), **given)
    fields = dict(beta=0.1, gradient_accumulation_steps=4, max_completion_length=4) | fields
    return PolicyGradientTrainer(
        _sharp(), rollouts.success, PolicyGradientConfig(**rollouts.settings(folder, **fields)),
        rollouts.prompts([1, 2, 3, 1] * 8), rollout_func=rollouts.rollouts, **given,
    )  # fmt: skip


def found(trainer, monkeypatch) -> dict:
    """The gap of the check, and the largest of a sequence."""
    seen, measure = {}, reference.gap_at_start

    def noted(trainer, differences, tokens):
        seen["largest"] = (differences.detach().abs() / tokens.clamp(min=1)).max().item()
        seen["gap"] = measure(trainer, differences, tokens)
        return seen["gap"]

    for module in ("preference.mixin", "offline.mixin", "policy_gradient.mixin"):
        monkeypatch.setattr(f"posttrain.trainers.{module}.gap_at_start", noted)
    trainer.train()
    return seen


@pytest.mark.core("preference")
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_short_answers_pass_in_bf16(family, tokenizer, tmp_path, monkeypatch):
    seen = found(build(family, tmp_path, tokenizer), monkeypatch)
    # the largest alone would have stopped the run
    assert 0 < seen["gap"] < 0.025 and seen["largest"] > 0.03


def test_a_single_short_answer_passes_in_bf16(tokenizer, tmp_path, monkeypatch):
    seen = found(build("offline", tmp_path, tokenizer, per_device_train_batch_size=1, seed=1), monkeypatch)
    assert seen["gap"] < 0.025


def _without_adapter(trainer):
    """The policy has an adapter with effect, and the reference was made without."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)


def _other_template(batch: dict, scored) -> dict:
    """The prompt's tokens are others."""
    ids = batch["input_ids"]
    return {**batch, "input_ids": torch.where(scored | (ids > 255), ids, (ids + 7) % 128)}


def _shifted(values, mask):
    """Each token has the log-probability of the one before it."""
    return torch.where(mask, values.roll(1, dims=1), values)


def _reference_with(family, how, monkeypatch):
    """Have the family's reference forwarded with another template, or read a token off, from now on."""
    if family == "preference":
        score = RobustDPOTrainer.score

        def other(self, model, batch, *args):
            mask = batch["completion_mask"]
            if how == "template":
                return score(self, model, _other_template(batch, mask.bool()), *args)
            return score(self, model, {**batch, "completion_mask": mask.roll(-1, dims=1)}, *args)

        monkeypatch.setattr(RobustDPOTrainer, "score", other)
    elif family == "offline":
        score = ALoLTrainer.score

        def other(self, model, batch):
            if how == "template":
                return score(self, model, _other_template(batch, batch["labels"] != -100))
            logps, mask = score(self, model, {**batch, "labels": batch["labels"].roll(-1, dims=1)})
            return logps.roll(1, dims=1), mask.roll(1, dims=1)

        monkeypatch.setattr(ALoLTrainer, "score", other)
    else:
        read = PolicyGradientTrainer._get_per_token_logps_and_entropies

        def other(self, model, ids, mask, kept, *args, **kwargs):
            if torch.is_grad_enabled():
                return read(self, model, ids, mask, kept, *args, **kwargs)
            if how == "template":
                ids = torch.cat([(ids[:, :-kept] + 7) % 128, ids[:, -kept:]], dim=1)
            found, *rest = read(self, model, ids, mask, kept, *args, **kwargs)
            return found if how == "template" else found.roll(1, dims=1), *rest

        monkeypatch.setattr(PolicyGradientTrainer, "_get_per_token_logps_and_entropies", other)


# each family once, and each fault once
@pytest.mark.core("preference-template", "offline-shifted", "policy_gradient-adapter")
@pytest.mark.parametrize("how", ["adapter", "template", "shifted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_reference_stops_the_run_in_bf16(family, how, tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as wrong:
        if how != "adapter":
            _reference_with(family, how, wrong)
        trainer = build(family, tmp_path, tokenizer)
        # rollouts come, and with them their reference, as the run goes on
        if how != "adapter" and family != "policy_gradient":
            wrong.undo()
        if how == "adapter":
            _without_adapter(trainer)
        with pytest.raises(ConfigError, match="differ.* nats per token before the first step .*in bfloat16"):
            trainer.train()
    assert trainer.state.global_step == 0


class _Ranks:
    """Two ranks that compute in a dtype: the other one found what is given."""

    def __init__(self, other, precision="no", device="cpu"):
        self.mixed_precision, self.device, self._other = precision, torch.device(device), other

    def gather(self, own):
        return torch.cat([own, torch.tensor([self._other])])


def _gap(differences, tokens, other=(0.0, 0.0, 0.0), dtype=torch.bfloat16, precision="no", device="cpu") -> float:
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(dtype=dtype), accelerator=_Ranks(list(other), precision, device)
    )
    return reference.gap_at_start(trainer, torch.tensor(differences), torch.tensor(tokens))


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "no"), (torch.float32, "bf16")])
def test_low_precision_goes_by_all_tokens_of_all_ranks(dtype, precision):
    low = dict(dtype=dtype, precision=precision)
    # (0.2 + 0.4 + 1.4) / (2 + 38 + 60)
    assert _gap([0.2, -0.4], [2, 38], (0.3, 1.4, 60.0), **low) == pytest.approx(0.02)
    # a handful of tokens counts as 32
    assert _gap([0.32, 0.0], [2, 1], **low) == pytest.approx(0.01)
    assert _gap([float("nan"), 0.0], [2, 40], **low) != _gap([0.0, 0.0], [2, 40], **low)


def test_fp32_goes_by_the_largest_sequence_of_all_ranks():
    assert _gap([2e-4, -4e-4], [2, 40], (1e-5, 0.1, 60.0), dtype=torch.float32) == pytest.approx(1e-4)
    assert _gap([2e-4, -4e-4], [2, 40], (0.3, 0.3, 60.0), dtype=torch.float32) == pytest.approx(0.3)


def test_fp32_by_tf32_is_low_precision(monkeypatch):
    fp32 = dict(dtype=torch.float32, device="cuda")
    assert _gap([0.32, 0.0], [2, 40], **fp32) == pytest.approx(0.16)
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(fp32_precision="tf32"))
    assert _gap([0.32, 0.0], [2, 40], **fp32) == pytest.approx(0.32 / 42)
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(dtype=torch.float32), accelerator=_Ranks([], "no", "cuda")
    )
    assert reference.zero_margin_tolerance(trainer.model, trainer.accelerator) == (1e-2, "float32 by TF32")
