"""A run that goes on under other settings of its optimizer has those that it says, and the state of the checkpoint."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from posttrain.errors import ConfigError
from posttrain.run import checkpoints, own_settings
from posttrain.run.markers import MARKER, content_of
from tests.families import METHODS
from tests.runs import identical, trainable

RUN = dict(
    optim="sgd", optim_args="momentum=0.9", learning_rate=0.05, max_steps=4, save_strategy="steps", save_steps=2,
    lr_scheduler_type="linear", warmup_steps=0,
)  # fmt: skip


class Gradients(TrainerCallback):
    """Keeps the gradient of each step."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})


def goes_on(folder, output_dir, **settings):
    trainer = METHODS["noisy_sft"].build(folder, output_dir, **RUN | dict(check_resume=False) | settings)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-2"))
    return trainer, gradients.found


@pytest.fixture(scope="module")
def begun(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    _, trainer = METHODS["noisy_sft"].train(tiny_folder, folder, **RUN)
    return folder, trainer


@pytest.fixture
def run(begun, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(begun[0], out)
    shutil.rmtree(out / "checkpoint-4")
    return out


def test_rate_momentum_and_decay_are_the_runs_and_the_state_the_checkpoints(tiny_folder, run, logged):
    weights = load_file(run / "checkpoint-2" / "adapter_model.safetensors")
    state = torch.load(run / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    now = dict(learning_rate=0.02, optim_args="momentum=0.5", weight_decay=0.1)
    trainer, gradients = goes_on(tiny_folder, run, **now)
    assert "goes on under this run's settings, which are not the checkpoint's: learning_rate: 0.05 there" in logged.text
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    reached, expected, wrong = trainable(trainer.model), {}, {}
    for number, name in enumerate(names):
        for into, momentum, base in ((expected, 0.5, 0.02), (wrong, 0.9, 0.05)):
            value, buffer = weights[name.replace(".default", "")], state[number]["momentum_buffer"]
            # linear over 4 steps: the third at a half of the rate, the fourth at a quarter
            for gradient, factor in zip(gradients, (0.5, 0.25), strict=True):
                buffer = momentum * buffer + gradient[name] + 0.1 * value
                value = value - base * factor * buffer
            into[name] = value
    for name in names:
        torch.testing.assert_close(reached[name], expected[name], rtol=1e-5, atol=1e-7)
    assert not all(torch.allclose(reached[name], wrong[name], rtol=1e-3, atol=1e-5) for name in names)
    assert trainer.lr_scheduler.base_lrs == [0.02, 0.02]
    saved = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [(group["momentum"], group["weight_decay"], group["initial_lr"]) for group in saved] == [
        (0.5, 0.1, 0.02), (0.5, 0.0, 0.02),
    ]  # fmt: skip


def test_equal_settings_go_on_bit_for_bit_where_nothing_is_compared(tiny_folder, begun, run, logged):
    trainer, _ = goes_on(tiny_folder, run)
    assert "under this run's settings" not in logged.text
    assert identical(trainable(trainer.model), trainable(begun[1].model))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_equal_settings_go_on_bit_for_bit_in_every_family(method, tiny_folder, tmp_path):
    settings, step, _ = method.resumed
    _, straight = method.train(tiny_folder, tmp_path, **settings)
    settings = settings | dict(save_strategy="no", check_resume=False)
    _, resumed = method.train(tiny_folder, tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **settings)
    assert identical(trainable(resumed.model), trainable(straight.model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now", "group"),
    [
        (
            dict(optim="pytorch_optimizer:ademamix", optim_args="alpha=5"),
            dict(optim_args="alpha=1,betas=(0.8,0.9,0.99)", weight_decay=0.5),
            dict(alpha=1.0, betas=(0.8, 0.9, 0.99), weight_decay=0.5),
        ),
        (
            dict(optim="adamw_torch", optim_args=None),
            dict(adam_beta1=0.5, adam_epsilon=1e-3, optim="adamw_torch_fused"),
            dict(betas=(0.5, 0.999), eps=1e-3),
        ),
        # the state of its step size lies in the groups, and stays
        (
            dict(optim="pytorch_optimizer:prodigy", optim_args=None, learning_rate=1.0, lr_scheduler_type="constant"),
            dict(weight_decay=0.25),
            dict(weight_decay=0.25),
        ),
    ],
    ids=["ademamix", "adamw", "prodigy"],
)
def test_every_setting_of_a_group_is_the_runs(before, now, group, tiny_folder, tmp_path):
    METHODS["noisy_sft"].train(tiny_folder, tmp_path, **RUN | before)
    kept = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["param_groups"][0]
    loaded = {}

    class First(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            loaded.update(copy.deepcopy({k: v for k, v in optimizer.param_groups[0].items() if k != "params"}))

    trainer = METHODS["noisy_sft"].build(tiny_folder, tmp_path, **RUN | before | dict(check_resume=False) | now)
    trainer.add_callback(First())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {name: loaded[name] for name in group} == group
    others = kept.keys() - group.keys() - {"params", "lr", "initial_lr", "fused", "foreach"}
    assert others and {name: loaded[name] for name in others} == {name: kept[name] for name in others}


def test_another_optimizer_is_refused_with_both_names(tiny_folder, run):
    with pytest.raises(ConfigError, match="optim: sgd there, adamw_torch here.*`resume_weights_only: true`"):
        goes_on(tiny_folder, run, optim="adamw_torch", optim_args=None)
    # from its weights alone it goes on
    trainer, _ = goes_on(tiny_folder, run, optim="adamw_torch", optim_args=None, resume_weights_only=True)
    assert trainer.state.global_step == 4


def test_groups_without_a_setting_are_refused(tiny_folder, run):
    path = run / "checkpoint-2" / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    for group in content["param_groups"]:
        del group["dampening"], group["momentum"]
    torch.save(content, path)
    # of another library nothing is compared beforehand
    (run / "checkpoint-2" / MARKER).unlink()
    with pytest.raises(ConfigError, match="its groups have no dampening, momentum, as of another optimizer"):
        goes_on(tiny_folder, run)


def test_rates_that_follow_from_those_before_are_refused(tiny_folder, run):
    with pytest.raises(ConfigError, match="the rates of lr_scheduler_type reduce_lr_on_plateau follow from"):
        goes_on(
            tiny_folder, run, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1,
            evaluated=True,
        )  # fmt: skip


@pytest.mark.parametrize("engine", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_under_an_engine_that_loads_them_other_settings_are_refused(engine, tiny_folder, run, monkeypatch):
    trainer = METHODS["noisy_sft"].build(tiny_folder, run, **RUN | dict(check_resume=False, learning_rate=0.01))
    then = checkpoints.settings_of(content_of(run / "checkpoint-2" / MARKER))
    own_settings.check(trainer, then)
    setattr(trainer, engine, True)
    with pytest.raises(ConfigError, match="learning_rate: 0.05 there, 0.01 here.*load an optimizer's settings"):
        own_settings.check(trainer, then)
    trainer.args.learning_rate = 0.05
    own_settings.check(trainer, then)


def test_logs_and_saves_fall_where_the_run_says(tiny_folder, run):
    trainer, _ = goes_on(tiny_folder, run, save_steps=1, logging_steps=2, check_resume=True)
    assert (run / "checkpoint-3").is_dir() and trainer.state.logging_steps == 2
