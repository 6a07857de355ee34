"""The table of completions: what trained is in it, and an evaluation leaves that of training alone."""

import pytest
from trl.trainer import grpo_trainer

from posttrain import HPTConfig, HPTTrainer
from tests.rollouts import prompts, train

SUCCESSES = [1, 0, 4, 2, 0, 3, 0, 1]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def hpt(folder, output_dir, **overrides):
    run = dict(trainer_class=HPTTrainer, config_class=HPTConfig, num_generations=4, max_steps=1, log_completions=True)
    run |= dict(gradient_accumulation_steps=8, num_completions_to_print=1, per_device_eval_batch_size=4)
    return train(folder, output_dir, **run | overrides)[1]


@pytest.mark.slow
def test_a_demonstration_stands_where_it_trained(tiny_folder, tmp_path):
    pandas = pytest.importorskip("pandas")
    hpt(tiny_folder, tmp_path, data=prompts(SUCCESSES))
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    shown = table[table["kind"] == "demonstration"]
    assert list(shown.index) == [4 * i for i, successes in enumerate(SUCCESSES) if successes == 0]
    expected = {row["prompt"]: row["demonstration"] for row in prompts(SUCCESSES)}
    assert [expected[prompt] for prompt in shown["prompt"]] == list(shown["completion"])
    assert (shown["advantage"] == 1).all() and shown["success"].isna().all()
    rest = table[table["kind"] == "rollout"]
    assert len(rest) == 29 and rest["success"].notna().all()


def test_an_evaluation_has_a_table_of_its_own(tiny_folder, tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    printed = []
    monkeypatch.setattr(grpo_trainer, "is_rich_available", lambda: True)
    monkeypatch.setattr(grpo_trainer, "print_prompt_completions_sample", lambda *a, **k: printed.append(list(a[0])))
    trainer = hpt(tiny_folder, tmp_path, data=prompts(SUCCESSES), eval_greedy=True)
    folder = tmp_path / "completions"
    before = (folder / "completions_00001.parquet").read_bytes()
    printed.clear()
    data = prompts([2, 3], demonstrations=False)
    assert "eval_greedy_success" in trainer.evaluate(data)
    assert len(printed) == 1 and set(printed[0]) == set(data["prompt"])
    trainer.evaluate({"a": data})
    names = ["completions_00001.parquet", "completions_00001_eval.parquet", "completions_00001_eval_a.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / names[0]).read_bytes() == before
    for name in names[1:]:
        assert set(pandas.read_parquet(folder / name)["prompt"]) == set(data["prompt"])
    assert len(trainer._logs["prompt"]) == 32, "training's rows are there still"
