import pytest

from posttrain.data.generated import arithmetic_tasks
from posttrain.rewards import check_golds, get_rewards


def test_rewards_are_trls_reward_functions(tmp_path, tokenizer):
    from trl import GRPOConfig, GRPOTrainer

    from posttrain.models import tiny_model

    seen = []

    def watch(completions, completion_ids, gold, **columns):
        seen.append((completions, completion_ids, gold))
        return [None] * len(completions)

    specs = ["maths_answer?engine=numbers", "length?max_length=8&cache=4", "format?pattern=.{1,6}", watch]
    rewards = get_rewards(specs)
    dataset = arithmetic_tasks(8, 0)
    check_golds(dataset, "gold", rewards[0])
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_steps=1,
        max_completion_length=8, num_generations=4, per_device_train_batch_size=8, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        tiny_model(), reward_funcs=rewards, args=args, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    ((completions, ids, golds),) = seen
    assert completions[0][0]["role"] == "assistant" and set(golds) <= set(dataset["gold"])
    logged = trainer.state.log_history[0]
    columns = {"completions": completions, "completion_ids": ids, "gold": golds}
    for reward in rewards[:3]:
        scores = reward(**columns)
        assert logged[f"rewards/{reward.__name__}/mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)
        assert reward.counters == {"scored": 16, "timeouts": 0, "exceptions": 0}
    assert logged["rewards/length/mean"] < 0
    assert rewards[3].counters["scored"] == 0
