"""The seams of a method that belong to no family: its forward, state, adapter and files, a run without a folder."""

import contextlib
import json

import pytest
import torch

from posttrain.run.mixin import without_folder
from tests import runs
from tests.families import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
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
            with super().around_policy_forward():
                yield
        finally:
            self.inside = False

    def method_state(self):
        return super().method_state() | {"rounds": self.state.global_step * 10}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.rounds = state["rounds"]

    def attach_adapter(self):
        super().attach_adapter()
        self.attached += 1

    def save_beside(self, folder, in_checkpoint):
        super().save_beside(folder, in_checkpoint)
        (folder / "method.json").write_text(json.dumps({"in_checkpoint": in_checkpoint}))


def build(method, model, folder, **overrides):
    settings = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, **method.split(method.step // 2)) | overrides
    seamed = type("Seamed", (Seams, method.trainer), {})
    return method.build(model, folder, trainer_class=seamed, config_class=method.config, **settings)


# schemes of adapters have the loop of a method that is here
@pytest.mark.core(*(name for name in METHODS if name not in ("gift_sw", "allora")))
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_methods_forward_is_the_backpropagated_one_and_no_other(method, tiny_folder, tmp_path):
    trainer = build(method, tiny_folder, tmp_path, **method.forwards)
    trainer.forwards.clear()
    trainer.train()
    inside = [grad for armed, grad in trainer.forwards if armed]
    # every one that is backpropagated, which are those of the steps' micro-batches
    assert len(inside) == trainer.armed == STEPS * 2 and all(inside)
    # references, the scoring of Dr. DPO's window, evaluation and old log-probabilities
    outside = [grad for armed, grad in trainer.forwards if not armed]
    assert outside and not any(outside)


@pytest.mark.core("a_lol")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_methods_state_and_adapter_come_back_on_resume(method, tiny_folder, tmp_path):
    trainer = build(method, tiny_folder, tmp_path)
    assert trainer.attached == 1
    trainer.train()
    assert trainer.attached == 1 and trainer.rounds == 0
    again = build(method, tiny_folder, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.rounds == 10 and again.attached == 2
    assert json.loads((tmp_path / "checkpoint-2" / "method.json").read_text()) == {"in_checkpoint": True}
    again.save_model()
    assert json.loads((tmp_path / "method.json").read_text()) == {"in_checkpoint": False}


@pytest.mark.core("policy_gradient")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_without_a_folder_leaves_nothing_but_what_is_saved(method, tiny_folder, tmp_path):
    base = build(method, tiny_folder, tmp_path / "with", save_strategy="no")
    base.train()
    with without_folder():
        # two clients in one place
        first, second = (build(method, tiny_folder, tmp_path / "without", save_strategy="no") for _ in range(2))
    for trainer in (first, second):
        trainer.train()
    assert not (tmp_path / "without").exists() or not any((tmp_path / "without").iterdir())
    ours, theirs = runs.trainable(first.model), runs.trainable(base.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first.save_model(str(tmp_path / "client"))
    assert (tmp_path / "client" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "client" / "posttrain_run.json").exists()
    # a trainer built afterwards has one again
    base.save_model()
    assert (tmp_path / "with" / "posttrain_run.json").is_file()
