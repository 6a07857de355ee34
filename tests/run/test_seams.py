"""The seams of a method that belong to no family: its forward, state, adapter and files, a run without a folder."""

import contextlib
import json

import pytest
import torch

from posttrain import ALoLConfig, ALoLTrainer, QAETrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.run.mixin import without_folder
from tests import rollouts, scored, training
from tests.conftest import make_pairs
from tests.training import lora

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
FAMILIES = ("preference", "offline", "policy_gradient")
STEPS = 2


class Seams:
    """A method that counts where its seams are entered."""

    def __init__(self, *args, **kwargs):
        self.armed, self.inside, self.forwards, self.attached, self.rounds = 0, False, [], 0, 0
        super().__init__(*args, **kwargs)
        inner = self.accelerator.unwrap_model(self.model)
        inner.register_forward_hook(lambda *_: self.forwards.append((self.inside, torch.is_grad_enabled())))

    @contextlib.contextmanager
    def around_policy_forward(self):
        self.armed, self.inside = self.armed + 1, True
        try:
            yield
        finally:
            self.inside = False

    def method_state(self):
        return {"rounds": self.state.global_step * 10}

    def load_method_state(self, state):
        self.rounds = state["rounds"]

    def attach_adapter(self):
        self.attached += 1

    def save_beside(self, folder, in_checkpoint):
        (folder / "method.json").write_text(json.dumps({"in_checkpoint": in_checkpoint}))


class Pairs(Seams, RobustDPOTrainer):
    pass


class Answers(Seams, ALoLTrainer):
    pass


class Rollouts(Seams, QAETrainer):
    pass


def build(family, model, folder, **overrides):
    settings = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2) | overrides
    if family != "policy_gradient":
        settings["per_device_train_batch_size"] = 2
    if family == "preference":
        args = RobustDPOConfig(**training.settings(folder, reduction="dr_dpo", eval_strategy="steps", **settings))
        return Pairs(model, args=args, train_dataset=make_pairs(8), eval_dataset=make_pairs(4), peft_config=lora())
    if family == "offline":
        args = ALoLConfig(**scored.settings(folder, eval_strategy="steps", **settings))
        rows = scored.make_scored(16)
        return Answers(model, args=args, train_dataset=rows, eval_dataset=rows, peft_config=lora())
    args = rollouts.PRESETS["qae"][1](**rollouts.settings(folder, beta=0.1, **settings))
    return Rollouts(
        model, rollouts.success, args, rollouts.prompts([1, 0, 4, 2]), peft_config=lora(),
        rollout_func=rollouts.rollouts,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_methods_forward_is_the_backpropagated_one_and_no_other(family, tiny_folder, tmp_path):
    trainer = build(family, tiny_folder, tmp_path, eval_steps=1)
    trainer.forwards.clear()
    trainer.train()
    inside = [grad for armed, grad in trainer.forwards if armed]
    # every one that is backpropagated, which are those of the steps' micro-batches
    assert len(inside) == trainer.armed == STEPS * 2 and all(inside)
    # references, the scoring of Dr. DPO's window, evaluation and old log-probabilities
    outside = [grad for armed, grad in trainer.forwards if not armed]
    assert outside and not any(outside)


@pytest.mark.core("offline")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_methods_state_and_adapter_come_back_on_resume(family, tiny_folder, tmp_path):
    trainer = build(family, tiny_folder, tmp_path)
    assert trainer.attached == 1
    trainer.train()
    assert trainer.attached == 1 and trainer.rounds == 0
    again = build(family, tiny_folder, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.rounds == 10 and again.attached == 2
    assert json.loads((tmp_path / "checkpoint-2" / "method.json").read_text()) == {"in_checkpoint": True}
    again.save_model()
    assert json.loads((tmp_path / "method.json").read_text()) == {"in_checkpoint": False}


@pytest.mark.core("policy_gradient")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_without_a_folder_leaves_nothing_but_what_is_saved(family, tiny_folder, tmp_path):
    base = build(family, tiny_folder, tmp_path / "with", save_strategy="no")
    base.train()
    with without_folder():
        # two clients in one place
        first, second = (build(family, tiny_folder, tmp_path / "without", save_strategy="no") for _ in range(2))
    for trainer in (first, second):
        trainer.train()
    assert not (tmp_path / "without").exists() or not any((tmp_path / "without").iterdir())
    ours, theirs = training.trainable(first.model), training.trainable(base.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first.save_model(str(tmp_path / "client"))
    assert (tmp_path / "client" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "client" / "posttrain_run.json").exists()
    # a trainer built afterwards has one again
    base.save_model()
    assert (tmp_path / "with" / "posttrain_run.json").is_file()
