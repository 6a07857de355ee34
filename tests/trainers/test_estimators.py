import pytest
import torch

from posttrain import PolicyGradientConfig
from posttrain.errors import ConfigError
from posttrain.objectives.estimators import PRESETS
from posttrain.objectives.policy_gradient import aggregate, per_token_loss
from posttrain.trainers.policy_gradient.estimator_settings import resolve
from tests.rollouts import train

ROLLOUTS = ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "qae", "hpt_rollouts"]
MIXES = [
    {"preset": "grpo", "advantage": "leave_one_out", "scale": "none"},
    {"preset": "grpo", "aggregate": "row_sum"},
    {"preset": "dr_grpo", "delta": 1.3},
    # no setting of TRL's loss has these
    {"preset": "cispo", "ratio_min": 0.9, "ratio_max": 1.1, "aggregate": "row_mean"},
    {"preset": "hpt_rollouts", "reference": "policy"},
    {"preset": "hpt_rollouts", "reference": "one", "shaping": "luffy"},
    {"preset": "grpo", "shaping": "luffy"},
    {"preset": "hpt_rollouts", "level": "product"},
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def name(value):
    return value if isinstance(value, str) else "-".join(str(part) for part in value.values())


@pytest.mark.core("dapo", "gspo", "cispo-0.9", "qae", "hpt_rollouts-product", "grpo-luffy", "grpo-row_sum")
@pytest.mark.parametrize("estimator", [*ROLLOUTS, *MIXES], ids=name)
def test_the_training_step_has_the_gradient_of_the_pure_functions(tiny_folder, tmp_path, estimator):
    parts, gaps, ratios = resolve(estimator), [], []

    def watched(trainer):
        inner = trainer._compute_loss

        def compute_loss(model, inputs):
            loss = inner(model, inputs)
            ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            width, mask = inputs["completion_ids"].size(1), inputs["completion_mask"].bool()
            logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
            logps = logits.gather(2, ids[:, 1:, None]).squeeze(2)[:, -width:]
            old = inputs["old_per_token_logps"]
            ratios.append((logps - old)[mask].detach().abs().max().item())
            losses = per_token_loss(logps, old, mask, inputs["advantages"], parts)
            # one micro-batch a step, so its rows and tokens are the step's
            pure = aggregate(losses, mask, parts, max_length=12, total_tokens=inputs["num_items_in_batch"])
            theirs = torch.autograd.grad(pure, list(model.parameters()))
            gap = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True)).sqrt()
            gaps.append((gap / sum(b.square().sum() for b in theirs).sqrt()).item())
            return loss

        trainer._compute_loss = compute_loss

    # the second pass over the same rollouts trains on stale log-probs
    run = dict(per_device_train_batch_size=32, gradient_accumulation_steps=1, num_iterations=2, prefix_sharing="never")
    _, trainer = train(
        tiny_folder, tmp_path, peft=False, before=watched, estimator=estimator, drop_zero_advantage_rows=False, **run
    )
    assert len(gaps) == 2 and max(gaps) <= 1e-5
    assert ratios[0] < 1e-5 and ratios[1] > 1e-2
    assert trainer.args.weighs_tokens == (estimator in MIXES[3:])


def test_presets_of_other_data_are_refused_by_name(tmp_path):
    for preset in ("sft", "luffy_offline", "a_lol", "hpt_demonstrations", "reinforce"):
        assert preset in PRESETS
        with pytest.raises(ConfigError, match=f"advantage '{PRESETS[preset].advantage}' is not of rollouts"):
            PolicyGradientConfig(str(tmp_path), estimator=preset)
    with pytest.raises(ConfigError, match="reference 'frozen' is that of offline methods"):
        PolicyGradientConfig(str(tmp_path), estimator={"preset": "grpo", "reference": "frozen"})


def test_an_estimators_advantage_and_gate_mix(tmp_path):
    args = PolicyGradientConfig(str(tmp_path), estimator="qae", gamma=0.0)
    assert (args.advantage, args.quantile, args.loss_type, args.gamma) == ("quantile", 0.4, "dapo", 0.0)
