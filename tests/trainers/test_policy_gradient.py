import pytest
import torch
from transformers import LlamaModel

from posttrain import HPTConfig, HPTTrainer, PolicyGradientConfig, QAEConfig, QAETrainer
from posttrain.errors import ConfigError, DataError, DivergedError, EnvironmentIssue
from posttrain.log import get_logger
from posttrain.mechanisms import group_rewards
from posttrain.models import tiny_model
from posttrain.objectives import advantages
from posttrain.run.sharing import PrefixSharing
from tests.rollouts import PARENT, entries, prompts, settings, success, train
from tests.runs import identical
from tests.training import distance

OFF = dict(prefix_sharing="never", drop_zero_advantage_rows=False)
LOSSES = {
    "grpo": dict(loss_type="grpo"),
    "bnpo": dict(loss_type="bnpo"),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none"),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28),
    "cispo": dict(loss_type="cispo", epsilon_high=5.0),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence"),
    "sapo": dict(loss_type="sapo"),
    "vespo": dict(loss_type="vespo"),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", True)
    return lambda: caplog.text


@pytest.mark.slow
def test_generated_rollouts_are_the_parents_too(tiny_folder, tmp_path):
    def even(completion_ids, **columns):
        return [float(sum(ids) % 2) for ids in completion_ids]

    run = dict(made_up=False, reward=even)
    reference, _ = train(tiny_folder, tmp_path / "trl", **PARENT, **run)
    change, _ = train(tiny_folder, tmp_path / "ours", **OFF, **run)
    assert identical(change, reference)


# one of each way that a loss is divided: by rows, by tokens of a micro-batch, of the step
QUICK = ("grpo", "bnpo", "dapo", "gspo")


@pytest.mark.core("dapo-2")
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize(
    "loss", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES]
)
def test_leaving_out_dead_rows_leaves_the_update(tiny_folder, tmp_path, loss, size):
    split = dict(per_device_train_batch_size=size, gradient_accumulation_steps=16 // size)
    whole, _ = train(tiny_folder, tmp_path / "whole", **OFF, **LOSSES[loss], **split)
    kept, trainer = train(tiny_folder, tmp_path / "kept", prefix_sharing="never", **LOSSES[loss], **split)
    assert distance(kept, whole) <= 1e-5
    # prompts without or with nothing but successes: 4 of 8
    logs = entries(trainer)
    assert sum(row["rows/kept_share"] for row in logs) / len(logs) == pytest.approx(0.5)
    assert sum(row["rows/forwarded"] for row in logs) < len(logs) * size or size == 1


def test_rows_of_a_prompt_share_it_in_micro_batches_and_the_update_is_the_same(tiny_folder, tmp_path, monkeypatch):
    long = prompts([1, 0, 3, 2, 2, 3, 1, 1])
    long = long.map(lambda row: {"prompt": row["prompt"] + " and so on" * 4})
    tokens = {}

    def run(name):
        forwarded, pack = tokens.setdefault(name, []), PrefixSharing.pack_rows

        def counted(self, *args, **kwargs):
            packed = pack(self, *args, **kwargs)
            # of passes that are backpropagated; a row that only fills up has nothing to score
            if torch.is_grad_enabled() and packed is not None:
                forwarded.append(packed.tokens)
            return packed

        monkeypatch.setattr(PrefixSharing, "pack_rows", counted)
        change, _ = train(tiny_folder, tmp_path / name, data=long, per_device_train_batch_size=4)
        monkeypatch.setattr(PrefixSharing, "pack_rows", pack)
        return change

    together = run("together")
    pack_kept_rows = group_rewards.pack_kept_rows
    monkeypatch.setattr(group_rewards, "pack_kept_rows", lambda *args, by_prompt: pack_kept_rows(*args))
    scattered = run("scattered")
    assert distance(together, scattered) <= 1e-4
    assert sum(tokens["together"]) < 0.85 * sum(tokens["scattered"]) and len(tokens["together"]) == len(
        tokens["scattered"]
    )


@pytest.mark.slow
def test_rows_stay_in_the_optimiser_step_that_they_were_generated_for(tiny_folder, tmp_path):
    # one generation serves two steps, of which the second has other rows
    run = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, steps_per_generation=8)
    whole, _ = train(tiny_folder, tmp_path / "whole", **OFF, **run)
    kept, trainer = train(tiny_folder, tmp_path / "kept", prefix_sharing="never", **run)
    assert trainer.state.global_step == 2 and distance(kept, whole) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("extra", [dict(beta=0.1), dict(entropy_coef=0.01), dict(top_entropy_quantile=0.5)])
def test_terms_of_their_own_keep_all_rows(tiny_folder, tmp_path, extra):
    whole, _ = train(tiny_folder, tmp_path / "whole", **OFF, **extra)
    change, trainer = train(tiny_folder, tmp_path / "ours", prefix_sharing="never", **extra)
    assert not trainer._drops_zero_advantage_rows and identical(change, whole)


@pytest.mark.slow
def test_quantile_advantages_are_what_trains(tiny_folder, tmp_path):
    run = dict(gradient_accumulation_steps=8, max_steps=1, prefix_sharing="never")
    qae = dict(trainer_class=QAETrainer, config_class=QAEConfig, num_generations=4)
    change, trainer = train(tiny_folder, tmp_path / "a", **qae, **run)
    mean, _ = train(tiny_folder, tmp_path / "b", **qae, **run, quantile=None, advantage="group_mean")
    parent = PARENT | dict(epsilon_high=0.28)
    grpo, _ = train(tiny_folder, tmp_path / "c", **parent, gradient_accumulation_steps=8, max_steps=1)
    assert distance(mean, grpo) <= 1e-5
    assert distance(change, grpo) > 0.1
    rewards = torch.tensor([[1.0] * n + [0.0] * (4 - n) for n in (1, 0, 4, 2, 0, 3, 0, 1)])
    expected = advantages.quantile_advantage(rewards, 0.4)
    assert list(trainer._logs["advantages"])[-32:] == pytest.approx(expected.flatten().tolist())
    log = entries(trainer)[0]
    assert log["rows/kept_share"] == pytest.approx((expected != 0).float().mean().item())
    assert log["qae/frac_zero_advantage"] == pytest.approx((expected == 0).float().mean().item())
    # K = 0.4: hard are success rates of at most 0.6
    assert log["qae/frac_hard_prompts"] == pytest.approx(6 / 8)
    assert log["qae/frac_easy_prompts"] == pytest.approx(2 / 8)


def centred_by_median(rewards):
    return rewards - rewards.median(dim=1, keepdim=True).values


def test_a_function_of_the_users_own_is_an_advantage(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, advantage=f"{__name__}:centred_by_median", max_steps=1)
    assert list(trainer._logs["advantages"])[:4] == [1.0, 0.0, 0.0, 0.0]


HPT = dict(trainer_class=HPTTrainer, config_class=HPTConfig, num_generations=4, max_steps=1)
WHOLE = dict(gradient_accumulation_steps=8)


def sft_gradient(folder, rows, weight):
    """-weight x d log pi(demonstration | prompt) of a fresh model with the same weights, by plain autograd."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = prompt + tokenizer(row["demonstration"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        scored = logps.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :]
        (-weight(len(ids) - len(prompt)) * scored.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.core("stale-log-probs-unified", "fresh-token", "fresh-prompt")
@pytest.mark.parametrize(
    ("normalization", "weight"),
    [
        ("unified", lambda n: 1 / (32 * 12)),
        ("prompt", lambda n: 1 / (8 * n)),
        ("token", lambda n: 1 / 46),
    ],
)
@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale-log-probs"])
def test_a_demonstration_row_is_an_sft_row(tiny_folder, tmp_path, normalization, weight, stale):
    data = prompts([0] * 8)
    run = dict(num_iterations=2, steps_per_generation=8) if stale else {}
    change, trainer = train(
        tiny_folder, tmp_path, peft=False, data=data, sft_normalization=normalization, **HPT, **WHOLE, **run
    )
    demonstration_tokens = sum(len(row["demonstration"]) + 1 for row in data)
    assert demonstration_tokens == 46
    gradient = sft_gradient(tiny_folder, data, weight)
    expected = {
        name: -0.5 * gradient[name.removeprefix("model.")] if name not in gradient else -0.5 * gradient[name]
        for name in change
    }
    assert distance(change, expected) <= 1e-5
    log = entries(trainer)[0]
    assert log["hpt/frac_sft_prompts"] == 1 and log["hpt/solve_none"] == 1 and log["hpt/demo_tokens"] == 46
    assert log["hpt/sft_nll"] > 1
    assert log["rows/kept_share"] == pytest.approx(8 / 32)


def test_the_gate_splits_prompts_by_their_successes(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, **HPT, **WHOLE)
    log = entries(trainer)[0]
    assert log["hpt/frac_sft_prompts"] == pytest.approx(3 / 8)
    assert log["hpt/success_rate"] == pytest.approx(11 / 32)
    assert log["hpt/solve_all"] == pytest.approx(1 / 8)
    shown = torch.tensor(list(trainer._logs["advantages"])[-32:]).view(8, 4)
    assert shown[1].tolist() == [1, 0, 0, 0], "a gated prompt's one living row is the demonstration"
    assert shown[3].tolist() == [0.5, 0.5, -0.5, -0.5]


@pytest.mark.slow
def test_a_closed_gate_is_dr_grpo_and_a_wide_one_is_sft(tiny_folder, tmp_path):
    dr_grpo = dict(loss_type="dr_grpo", scale_rewards="none", epsilon=1e9, max_steps=1)
    parent, _ = train(tiny_folder, tmp_path / "a", **PARENT, **dr_grpo, **WHOLE)
    closed, _ = train(tiny_folder, tmp_path / "b", **HPT, **WHOLE, **OFF, gamma=None)
    assert identical(closed, parent)
    everything, _ = train(tiny_folder, tmp_path / "c", **HPT, **WHOLE, gamma=1.0)
    failing, _ = train(tiny_folder, tmp_path / "d", **HPT, **WHOLE, data=prompts([0] * 8))
    other = prompts([1, 0, 4, 2, 0, 3, 0, 1])
    assert distance(everything, failing) > 1e-3, "other prompts"
    again, _ = train(
        tiny_folder,
        tmp_path / "e",
        **HPT,
        **WHOLE,
        gamma=1.0,
        data=other,
        reward=lambda completion_ids, **_: [0.0] * len(completion_ids),
    )
    assert distance(everything, again) <= 2e-5, "rewards play no part"


@pytest.mark.slow
def test_the_demonstration_of_an_open_prompt_plays_no_part(tiny_folder, tmp_path):
    data = prompts([1, 2, 3, 1, 0, 2, 3, 1])
    changed = data.to_list()
    changed[0]["demonstration"] = "zzzzz"
    first, _ = train(tiny_folder, tmp_path / "a", **HPT, **WHOLE, data=data)
    second, _ = train(tiny_folder, tmp_path / "b", **HPT, **WHOLE, data=type(data).from_list(changed))
    assert identical(first, second)
    changed[4]["demonstration"] = "zzzzz"
    third, _ = train(tiny_folder, tmp_path / "c", **HPT, **WHOLE, data=type(data).from_list(changed))
    assert distance(third, first) > 1e-3


def test_a_soft_gate_mixes_by_the_number_of_successes(tiny_folder, tmp_path):
    table = [[0, 0, 1], [0.5, 0.5, 0.25], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    soft = dict(gamma=None, soft_gate=table, demonstration_loss="luffy")
    _, trainer = train(tiny_folder, tmp_path, **HPT, **WHOLE, **soft)
    shown = torch.tensor(list(trainer._logs["advantages"])[-32:]).view(8, 4)
    # one success in four: the demonstration, of reward 1, has taken the place of the first rollout
    filled = torch.tensor([1.0, 0, 0, 0]) - 0.25
    assert shown[0].tolist() == pytest.approx([0.5 * 0.75 + 0.25, *(0.5 * filled[1:]).tolist()])
    assert shown[1].tolist() == [1, 0, 0, 0] and shown[3].tolist() == [0.5, 0.5, -0.5, -0.5]


@pytest.mark.slow
def test_an_off_policy_row_is_weighed_by_its_likelihood(tiny_folder, tmp_path):
    changes = {}
    for loss in ("sft", "luffy", "srft"):
        table = [[0, 0, 1]] * 5 if loss == "sft" else [[0, 1, 0]] * 5
        run = dict(gamma=None, soft_gate=table, demonstration_loss=loss, data=prompts([0] * 8))
        changes[loss], _ = train(tiny_folder, tmp_path / loss, **HPT, **WHOLE, **run)
    # p is near 1 / 259 throughout in an untrained model, and A = 1 - 1/4
    p = 1 / 259
    norms = {name: sum(v.square().sum() for v in change.values()).sqrt() for name, change in changes.items()}
    assert norms["srft"] / norms["sft"] == pytest.approx(0.75 * p, rel=0.1)
    assert norms["luffy"] / norms["sft"] == pytest.approx(0.75 * 0.1 * p / (p + 0.1) ** 2, rel=0.1)


@pytest.mark.slow
def test_a_norm_beyond_the_limit_skips_the_step(tiny_folder, tmp_path, said):
    change, _ = train(tiny_folder, tmp_path, skip_grad_norm=1e-9, max_grad_norm=1.0)
    assert not any(value.any() for value in change.values())
    assert "step 1 skipped: gradient norm" in said()


REFUSED = [
    (dict(advantage="median"), "advantage is 'median'; it must be one of group_mean, quantile, leave_one_out"),
    (dict(advantage="no_such_module:f"), "cannot be imported"),
    (dict(advantage="quantile", quantile=1.0), "quantile is 1.0; it must lie in (0, 1)"),
    (dict(advantage="quantile", quantile=0.0), "quantile is 0.0; it must lie in (0, 1)"),
    (dict(quantile=0.4), "quantile is 0.4, which has no effect on advantage: group_mean"),
    (
        dict(advantage="quantile", quantile=0.4, multi_objective_aggregation="normalize_then_sum"),
        "multi_objective_aggregation is normalize_then_sum with a quantile",
    ),
    (dict(num_generations=1), "num_generations is 1; an advantage compares rollouts"),
    (dict(gamma=1.5), "gamma is 1.5; it is a share of rollouts, in [0, 1]"),
    (dict(gamma=-0.1), "gamma is -0.1; it is a share of rollouts, in [0, 1]"),
    (dict(gamma=0.0, soft_gate=[[1, 0, 0]] * 5), "gamma and soft_gate are both set"),
    (dict(soft_gate=[[1, 0, 0]] * 4), "soft_gate must have 5 rows"),
    (dict(gamma=0.0, top_entropy_quantile=0.5), "top_entropy_quantile is 0.5 with a gate"),
    (dict(gamma=0.0, importance_sampling_level="sequence"), "importance_sampling_level is sequence with a gate"),
    (dict(sft_coef=-1.0), "sft_coef is -1.0; it must be 0 or more"),
    (dict(skip_grad_norm=0.0), "skip_grad_norm is 0.0; it must be above 0"),
    (dict(skip_grad_norm=80.0), "skip_grad_norm is 80.0 and max_grad_norm is 0.0, with which no norm is computed"),
    (dict(gamma=0.0, loss_type="bnpo", sft_normalization="prompt"), "sft_normalization is prompt with loss_type bnpo"),
    (dict(loss_type="ppo"), "loss_type is 'ppo'; it must be one of"),
    (dict(temperature=0.0), "temperature is 0.0; it must be above 0"),
    (dict(generation_kwargs={"temperature": 0.5}), "generation_kwargs sets temperature"),
    (dict(generation_kwargs={"stop_strings": ["a"]}), "generation_kwargs sets stop_strings to ['a']; it needs the tok"),
    (dict(generation_kwargs={"prompt_lookup_num_tokens": 3}), "sets prompt_lookup_num_tokens to 3; it drafts for a si"),
    (dict(top_p=0.9, use_vllm=True), "top_p is 0.9, so rollouts are drawn from another distribution"),
    (dict(generation_kwargs={"top_k": 5}, use_vllm=True), "top_k is 5, so rollouts"),
    (dict(data=prompts([0] * 3)), "train_dataset has 3 rows, and a generation takes 4 prompts"),
    (dict(sft_normalization="row"), "sft_normalization is 'row'"),
]


@pytest.mark.parametrize(
    ("fields", "message"), REFUSED, ids=[next(iter(f)) + f"-{i}" for i, (f, _) in enumerate(REFUSED)]
)
def test_impossible_settings_are_refused_by_name(tiny_folder, tmp_path, fields, message):
    with pytest.raises((ConfigError, DataError)) as error:
        train(tiny_folder, tmp_path, **fields)
    assert message in str(error.value)


def test_vllm_is_asked_for_before_the_model_loads(tiny_folder, tmp_path):
    with pytest.raises(EnvironmentIssue, match=r'use_vllm needs the package vllm: pip install "posttrain\[vllm\]"'):
        train(tiny_folder, tmp_path, use_vllm=True)


@pytest.mark.slow
def test_sampling_settings_are_kept_with_the_rollouts(tiny_folder, tmp_path, said):
    pandas = pytest.importorskip("pandas")
    sampled = dict(temperature=0.7, top_p=0.9, generation_kwargs={"min_p": 0.01})
    train(tiny_folder, tmp_path, log_completions=True, num_completions_to_print=1, **sampled)
    table = next((tmp_path / "completions").glob("*.parquet"))
    drawn_with = "temperature 0.7, top_p 0.9, top_k 0, min_p 0.01, repetition_penalty 1.0"
    assert set(pandas.read_parquet(table)["sampling"]) == {drawn_with}
    assert "top_p is 0.9, min_p is 0.01, so rollouts are drawn from another distribution" in said()


@pytest.mark.parametrize(("quantile", "side"), [(0.2, "the least of them, so no advantage is below 0"), (0.5, None)])
def test_a_quantile_at_the_edge_of_a_group_is_said(tmp_path, said, quantile, side):
    PolicyGradientConfig(str(tmp_path), advantage="quantile", quantile=quantile, num_generations=4)
    assert (side in said()) if side else "of them" not in said()


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (lambda r: [{"prompt": x["prompt"]} for x in r], {}, "train_dataset has no column 'demonstration'"),
        (lambda r: [{"question": "?"}], dict(gamma=None), "train_dataset has no column 'prompt'. Found: question"),
        (lambda r: [x | {"demonstration": ""} for x in r], {}, "8 of 8 demonstrations of train_dataset are empty"),
        (lambda r: [x | {"demonstration": "y" * 20} for x in r], {}, "longer than max_completion_length (12"),
    ],
    ids=["no-demonstration", "no-prompt", "empty", "long"],
)
def test_unusable_data_is_refused_before_the_model_loads(tmp_path, tiny_folder, rows, fields, message):
    data = prompts([0] * 8)
    with pytest.raises(DataError) as error:
        train(tiny_folder, tmp_path, **HPT, data=type(data).from_list(rows(data.to_list())), **fields)
    assert message in str(error.value)


def test_fallbacks_for_demonstrations_are_taken_where_asked_for(tiny_folder, tmp_path):
    rows = prompts([0] * 8).to_list()
    rows[0]["demonstration"], rows[1]["demonstration"] = "", "y" * 20
    choices = dict(empty_demonstrations="rollouts", long_demonstrations="truncate")
    _, trainer = train(tiny_folder, tmp_path, **HPT, **WHOLE, **choices, data=type(prompts([0])).from_list(rows))
    log = entries(trainer)[0]
    assert log["hpt/frac_sft_prompts"] == pytest.approx(7 / 8)
    assert log["hpt/demo_tokens"] == 12 + sum(len(row["demonstration"]) + 1 for row in rows[2:])


@pytest.mark.slow
def test_generations_without_any_score_teach_nothing_and_are_no_fault(tiny_folder, tmp_path):
    def none(completion_ids, **columns):
        return [None] * len(completion_ids)

    for advantage in (dict(), dict(advantage="leave_one_out"), dict(preset="qae")):
        change, trainer = train(tiny_folder, tmp_path / str(len(str(advantage))), reward=none, max_steps=3, **advantage)
        assert trainer.state.global_step == 3 and not any(value.any() for value in change.values())
        assert entries(trainer)[0]["rows/kept_share"] == 0
    with pytest.raises(DivergedError, match=r"all rewards of a prompt were equal, or None \(no score\)"):
        train(tiny_folder, tmp_path / "b", reward=none, max_steps=5, max_steps_without_gradient=2)


def test_generations_without_any_score_end_the_run_where_a_function_has_raised(tiny_folder, tmp_path):
    calls = []

    def seldom(completion_ids, **columns):
        calls.append(None)
        if len(calls) == 1:
            return [float(i) for i in range(len(completion_ids))]
        raise KeyError("gold")

    with pytest.raises(DataError, match=r"returned None for all 16 completions of step 2.*KeyError"):
        train(tiny_folder, tmp_path, reward=seldom, max_steps=3)


def test_generations_without_gradient_stop_the_run_with_the_cause(tiny_folder, tmp_path):
    with pytest.raises(DivergedError, match="no rollout of the last 2 generations had a gradient"):
        train(tiny_folder, tmp_path, data=prompts([0] * 8), max_steps_without_gradient=2, max_steps=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "term",
    [
        dict(beta=0.04),
        dict(entropy_coef=0.01),
        dict(use_adaptive_entropy=True),
        dict(preset="hpt", num_generations=4),
        dict(preset="hpt", num_generations=4, soft_gate=[[0, 0, 0.5]] + [[1, 0, 0]] * 4, gamma=None),
    ],
    ids=["kl", "entropy", "adaptive", "demonstrations", "soft_gate"],
)
def test_a_run_with_another_gradient_goes_on(tiny_folder, tmp_path, term):
    run = dict(data=prompts([0] * 8), max_steps_without_gradient=2, max_steps=5)
    _, trainer = train(tiny_folder, tmp_path, **run, **term)
    assert trainer.state.global_step == 5


@pytest.mark.slow
def test_an_auxiliary_loss_keeps_a_run_going(tokenizer, tmp_path):
    tiny_model("mixtral", output_router_logits=True).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    run = dict(data=prompts([0] * 8), max_steps_without_gradient=2, max_steps=4, peft=False)
    change, trainer = train(str(tmp_path / "moe"), tmp_path / "a", **run, router_aux_loss_coef=0.1)
    assert trainer.state.global_step == 4 and any(value.any() for value in change.values())
    with pytest.raises(DivergedError, match="no rollout of the last 2 generations had a gradient"):
        train(str(tmp_path / "moe"), tmp_path / "b", **run, router_aux_loss_coef=0.0)


def test_demonstrations_of_no_weight_are_no_gradient(tiny_folder, tmp_path):
    run = dict(preset="hpt", num_generations=4, data=prompts([0] * 8), max_steps_without_gradient=2, max_steps=5)
    with pytest.raises(DivergedError, match="no rollout of the last 2 generations had a gradient"):
        train(tiny_folder, tmp_path, **run, sft_coef=0.0)


@pytest.mark.slow
def test_unscorable_rewards_are_counted_and_weigh_nothing(tiny_folder, tmp_path):
    def some(completion_ids, **columns):
        return [None if ids[-2] % 2 else float(ids[0] == 65) for ids in completion_ids]

    _, trainer = train(tiny_folder, tmp_path, reward=some, advantage="quantile", quantile=0.4)
    assert 0 < entries(trainer)[0]["rollouts/unscorable_share"] < 1


def test_the_gate_is_off_in_evaluation(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, **HPT, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(prompts([0, 1], demonstrations=False))
    assert not any("hpt/" in name for name in metrics) and "eval_loss" in metrics


def test_presets_carry_the_methods_settings(tmp_path):
    qae = QAEConfig(str(tmp_path), per_device_train_batch_size=16)
    assert (qae.advantage, qae.quantile, qae.loss_type, qae.epsilon, qae.epsilon_high) == (
        "quantile",
        0.4,
        "dapo",
        0.2,
        0.28,
    )
    hpt = HPTConfig(str(tmp_path), per_device_train_batch_size=8)
    assert (hpt.gamma, hpt.loss_type, hpt.scale_rewards, hpt.beta, hpt.num_generations) == (
        0.0,
        "dr_grpo",
        "none",
        0.0,
        8,
    )
    assert PolicyGradientConfig(str(tmp_path)).gamma is None


def test_success_is_logged_by_rollout_and_by_prompt(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, gradient_accumulation_steps=8, max_steps=1)
    log = entries(trainer)[0]
    assert log["rollouts/pass_at_1"] == pytest.approx(11 / 32)
    assert log["rollouts/pass_at_4"] == pytest.approx(5 / 8)
    assert log["rollouts/unscorable_share"] == 0


def test_success_may_be_read_from_one_reward_of_several(tiny_folder, tmp_path):
    def length(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    run = dict(HPT, success_reward="success", reward=[success, length])
    _, trainer = train(tiny_folder, tmp_path, **run, **WHOLE)
    assert entries(trainer)[0]["hpt/frac_sft_prompts"] == pytest.approx(3 / 8)
    with pytest.raises(ConfigError, match="success_reward is 'nobody'; it must be one of success"):
        train(tiny_folder, tmp_path / "other", **HPT, success_reward="nobody")


@pytest.mark.slow
def test_evaluation_answers_each_prompt_once_without_sampling(tiny_folder, tmp_path):
    answers = []

    def even(completion_ids, **columns):
        answers.append([tuple(ids) for ids in completion_ids])
        return [float(sum(ids) % 2) for ids in completion_ids]

    data = prompts([0, 1, 2, 3, 4, 0], demonstrations=False)
    _, trainer = train(tiny_folder, tmp_path, made_up=False, reward=even, per_device_eval_batch_size=4)
    before = trainer.generation_config.do_sample
    results = []
    for _ in range(2):
        answers.clear()
        metrics = trainer.evaluate(data)
        results.append((metrics["eval_greedy_success"], answers[-2:]))
    assert results[0] == results[1], "no chance in it"
    greedy = [ids for batch in results[0][1] for ids in batch][: len(data)]
    assert results[0][0] == pytest.approx(sum(sum(ids) % 2 for ids in greedy) / len(data))
    assert trainer.generation_config.do_sample == before is True
    trainer.args.eval_greedy = False
    assert "eval_greedy_success" not in trainer.evaluate(data)


@pytest.mark.slow
def test_the_greedy_pass_is_on_by_itself_where_it_adds_little(tiny_folder, tmp_path):
    data = prompts([0, 1], demonstrations=False)
    calls = []

    def counts(completion_ids, log_metric, **columns):
        calls.append(len(completion_ids))
        log_metric("mine", float(len(completion_ids)))
        return [float(sum(ids) % 2) for ids in completion_ids]

    run = dict(made_up=False, reward=counts, per_device_eval_batch_size=2, max_steps=1)
    _, trainer = train(tiny_folder, tmp_path / "a", **run, num_generations_eval=1)
    calls.clear()
    assert "eval_greedy_success" not in trainer.evaluate(data) and calls == [2], "it would double the cost"
    trainer.args.eval_greedy = True
    assert "eval_greedy_success" in trainer.evaluate(data)
    with pytest.raises(ConfigError, match="an evaluation batch holds 2 rollouts .* no multiple of the 4 drawn"):
        train(tiny_folder, tmp_path / "c", **run)[1].evaluate(data)
    _, trainer = train(tiny_folder, tmp_path / "b", **run | dict(per_device_eval_batch_size=4), beta=0.1)
    calls.clear()
    metrics = trainer.evaluate({"a": data})
    assert calls == [4, 4, 4] and metrics["eval_a_mine"] == 4
    alone = {name: value for name, value in metrics.items() if "completions" in name or "rollouts" in name}
    trainer.args.eval_greedy = False
    torch.manual_seed(0)
    without = trainer.evaluate({"a": data})
    assert alone.keys() <= without.keys() and set(metrics) - set(without) == {"eval_a_greedy_success"}
    assert trainer.beta == 0.1
    with pytest.raises(ConfigError, match="eval_greedy is true with use_vllm"):
        PolicyGradientConfig(str(tmp_path), eval_greedy=True, use_vllm=True)


def test_skipping_is_refused_under_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="skip_grad_norm is 80.0 under DeepSpeed"):
        PolicyGradientConfig(str(tmp_path), skip_grad_norm=80.0)


@pytest.mark.slow
def test_a_gradient_that_is_no_number_is_skipped_where_asked_for(tiny_folder, tmp_path, said):
    def broken(trainer):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * float("nan"))

    change, _ = train(tiny_folder, tmp_path / "a", before=broken, skip_grad_norm=80.0, max_grad_norm=1.0)
    assert not any(value.any() for value in change.values()) and "gradient norm nan" in said()
    with pytest.raises(DivergedError, match="the gradient became NaN"):
        train(tiny_folder, tmp_path / "b", before=broken, max_grad_norm=1.0)


@pytest.mark.core("1")
@pytest.mark.parametrize("size", [1, 8])
def test_the_demonstrations_likelihood_is_a_mean_over_their_tokens(tiny_folder, tmp_path, size):
    split = dict(per_device_train_batch_size=size, gradient_accumulation_steps=32 // size)
    run = HPT | dict(data=prompts([0] * 8))
    _, whole = train(tiny_folder, tmp_path / "a", **run, per_device_train_batch_size=32, gradient_accumulation_steps=1)
    _, trainer = train(tiny_folder, tmp_path / "b", **run, **split)
    assert entries(trainer)[0]["hpt/sft_nll"] == pytest.approx(entries(whole)[0]["hpt/sft_nll"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["prompt", "token"])
@pytest.mark.parametrize("loss", [dict(loss_type="grpo"), dict(loss_type="dapo")], ids=["grpo", "dapo"])
def test_a_demonstration_weighs_the_same_under_every_loss(tiny_folder, tmp_path, loss, normalization):
    run = HPT | WHOLE | dict(data=prompts([0] * 8), sft_normalization=normalization)
    plain, _ = train(tiny_folder, tmp_path / "a", **run)
    other, _ = train(tiny_folder, tmp_path / "b", **run, **loss)
    assert distance(other, plain) <= 1e-5


def test_an_evaluation_batch_without_a_score_goes_on(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, per_device_eval_batch_size=4, eval_greedy=False)
    trainer.reward_funcs[0] = lambda completion_ids, **_: [None] * len(completion_ids)
    assert "eval_loss" in trainer.evaluate(prompts([0, 1]))


@pytest.mark.slow
def test_a_window_narrower_than_the_rows_cannot_always_share(tokenizer, tmp_path):
    for window in (16, 64):
        tiny_model("mistral", sliding_window=window).save_pretrained(tmp_path / f"{window}")
        tokenizer.save_pretrained(tmp_path / f"{window}")
    _, trainer = train(str(tmp_path / "64"), tmp_path / "a", prefix_sharing="always")
    assert trainer._sharing.active
    with pytest.raises(ConfigError, match="it has rows longer than the sliding window of 16"):
        train(str(tmp_path / "16"), tmp_path / "b", prefix_sharing="always")


@pytest.mark.core("trips")
@pytest.mark.parametrize("kind", ["counts positions", "trips over packed rows"])
def test_a_model_that_is_found_unfit_for_sharing_is_padded_from_the_first_forward_on(
    kind, tokenizer, tmp_path, monkeypatch
):
    if kind == "counts positions":
        model = tiny_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0,
                           attn_pdrop=0.0)  # fmt: skip
    else:
        model, forward = tiny_model(), LlamaModel.forward

        def trips(self, *args, attention_mask=None, **kwargs):
            if attention_mask is not None and attention_mask.dim() == 4:
                raise RuntimeError("no such mask")
            return forward(self, *args, attention_mask=attention_mask, **kwargs)

        monkeypatch.setattr(LlamaModel, "forward", trips)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def update(setting):
        return train(str(tmp_path / "base"), tmp_path / setting, peft=False, max_steps=1, beta=0.1,
                     learning_rate=0.1, prefix_sharing=setting)  # fmt: skip

    (padded, _), (declined, trainer) = update("never"), update("auto")
    assert not trainer._sharing.active
    assert all(torch.equal(declined[name], padded[name]) for name in padded)
    assert entries(trainer)[0]["kl"] == 0.0


@pytest.mark.parametrize(
    ("given", "remedy"),
    [("tokenizer", "write processing_class"), ("beta", "it is a setting: QAEConfig"), ("nothing", "it has ")],
)
def test_an_argument_that_trainers_do_not_have_is_answered_with_what_to_write(tiny_folder, tmp_path, given, remedy):
    with pytest.raises(TypeError, match=f"QAETrainer has no argument '{given}'; {remedy}"):
        QAETrainer(tiny_folder, success, QAEConfig(**settings(tmp_path)), prompts([1] * 4), **{given: 1})


@pytest.mark.slow
def test_a_run_may_start_anew_in_its_folder(tiny_folder, tmp_path):
    run = HPT | dict(save_strategy="steps", save_steps=1)
    train(tiny_folder, tmp_path, **run)
    _, trainer = train(tiny_folder, tmp_path, **run)
    assert trainer.state.global_step == 1
    with pytest.raises(ConfigError, match="gamma: 0.0 there, 0.5 here"):
        train(tiny_folder, tmp_path, **run | dict(gamma=0.5))
