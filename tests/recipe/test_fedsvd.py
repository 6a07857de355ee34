"""The recipe of federated training, with the model and the data replaced by tiny ones."""

import json
import runpy
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from posttrain.federated import curves
from posttrain.models import resolve_model
from posttrain.paths import configs_dir, recipes_dir
from tests.recipe.in_process import lines, words

ROWS = [
    {"prompt": f"Is {i} even?", "completion": " yes" if i % 2 else " no", "label": f"l{i % 3}", "user": f"u{i % 20}"}
    for i in range(60)
]


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """Runs the recipe with one of its configs: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))

    def run(config="cpu", **given):
        settings = dict(
            model_name_or_path="embedded:tiny", dataset_name="rows.jsonl", output_dir="run", rounds=2, num_clients=3,
            max_steps=1, per_device_train_batch_size=4, test_split_size=0.2,
        )  # fmt: skip
        settings |= dict(clients_per_round=2, min_client_rows=2, partition_column="label") if config == "cpu" else {}
        settings |= dict(expected_batch_size=8, target_delta=1e-3) if config == "dp" else {}
        path = str(configs_dir() / "fedsvd" / f"{config}.yaml")
        monkeypatch.setattr(sys, "argv", ["fedsvd.py", "--config", path, *words(settings | given)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(recipes_dir() / "fedsvd.py"), run_name="__main__")
        said = capsys.readouterr()
        return caught.value.code, said.out, said.err

    return run


def rounds_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_the_config_trains_an_adapter_that_plain_peft_loads_and_goes_on(recipe, tmp_path):
    code, out, err = recipe()
    assert code == 0 and "Saved to run/adapter" in out, err
    run = tmp_path / "run"
    reports = rounds_of(run)
    assert [len(report["clients"]) for report in reports] == [2, 2] and reports[-1]["orthonormality"] < 1e-5
    assert all(report["evaluation"]["loss"] > 0 and report["loss"] > 0 for report in reports)
    assert (run / "curves.png").stat().st_size > 10_000 and not list((run / "ledgers").glob("*"))
    settings = yaml.safe_load((run / "resolved_config.yaml").read_text())
    assert (settings["federated"]["method"], settings["data"]["dataset_name"]) == ("fedsvd", "rows.jsonl")
    tokens, base = torch.arange(1, 9)[None], AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny"))

    def trained():
        return AutoPeftModelForCausalLM.from_pretrained(run / "adapter")(tokens).logits

    first = trained()
    card = (run / "adapter" / "README.md").read_text()
    assert "FedSVD ([arXiv 2505.12805]" in card and "embedded:tiny" in card and str(tmp_path) not in card
    assert "## Privacy" not in card and "base_model: /" not in card
    assert first.isfinite().all() and (first - base(tokens).logits).abs().max() > 1e-6
    code, _, err = recipe(rounds=3)
    assert code == 2 and "run has rounds of a run already" in err
    code, _, err = recipe(rounds=3, resume_from_checkpoint="auto", learning_rate=0.5)
    assert code == 2 and "is of another run: turn learning_rate was '0.002' and is '0.5'" in err
    code, _, err = recipe(rounds=3, resume_from_checkpoint="auto")
    assert code == 0 and [report["round"] for report in rounds_of(run)] == [1, 2, 3], err
    assert rounds_of(run)[:2] == reports and not torch.equal(trained(), first)


def test_private_clients_keep_one_promise_over_all_rounds(recipe, tmp_path):
    pytest.importorskip("dp_accounting")
    code, out, err = recipe("dp")
    assert code == 0, err
    first, last = rounds_of(tmp_path / "run")
    for name, told in last["clients"].items():
        assert 0 < first["clients"][name]["epsilon"] < told["epsilon"] == pytest.approx(8, rel=1e-4)
        assert told["loss"] is None and (tmp_path / "run" / "ledgers" / name / "privacy_ledger.jsonl").is_file()
    assert last["loss"] is None and last["evaluation"]["loss"] > 0
    settings = yaml.safe_load((tmp_path / "run" / "resolved_config.yaml").read_text())
    assert settings["training"]["target_epsilon"] == 8
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "(epsilon, delta)-differentially private for each row" in card and "client-2 |" in card


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "dp"])
def test_a_dry_run_tells_clients_rounds_and_what_is_spent(recipe, tmp_path, config):
    pytest.importorskip("dp_accounting")
    code, out, err = recipe(config, dry_run="true")
    assert code == 0 and not (tmp_path / "run").exists(), err
    told = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith(("method", "rounds")))
    assert told == {"method": "fedsvd", "rounds": "2"}
    assert "client-2" in out and ("epsilon of all rounds" in out) is (config == "dp")


REFUSED = [
    ("cpu", dict(use_peft="false", lora_r=None), "adapter is none; clients train one LoRA"),
    ("cpu", dict(adapter="allora", lora_alpha=None), "the adapter is no plain LoRA: it is one of the scheme allora"),
    ("cpu", dict(use_dora="true"), "the adapter is no plain LoRA"),
    ("cpu", dict(push_to_hub="true"), "push_to_hub is True, which is of a trainer's own run"),
    ("cpu", dict(overwrite="true"), "overwrite is True, which would replace rounds"),
    ("cpu", dict(refactor_every="2"), "refactor_every is 2, which is of the steps of a turn"),
    ("cpu", dict(load_in_4bit="true"), "load_in_4bit is true"),
    ("cpu", dict(partition_column="topic"), "no column topic"),
    ("cpu", dict(method="fedsvdd"), "method is 'fedsvdd'"),
    ("cpu", dict(num_clients=60), "num_clients is 60, and there are 48 rows"),
    ("dp", dict(expected_batch_size=40), "client client-0: expected_batch_size is 40, and the training data has 16"),
    ("dp", dict(target_delta=0.5), "client client-0: target_delta is 0.5"),
    ("dp", dict(target_epsilon="null"), "target_epsilon and noise_multiplier are both null"),
    ("dp", dict(embedding_noise="neftune"), "embedding_noise is 'neftune', which a private run does not have"),
    ("dp", dict(refactor_every="2"), "refactor_every is 2"),
]


@pytest.mark.parametrize(("config", "given", "said"), REFUSED)
def test_what_no_run_of_rounds_has_is_refused_before_the_model_loads(recipe, monkeypatch, config, given, said):
    if config == "dp":
        pytest.importorskip("dp_accounting")

    def loaded(*args, **kwargs):
        raise AssertionError("The model loads.")

    monkeypatch.setattr("posttrain.recipe.federated.load_model", loaded)
    code, _, err = recipe(config, **{name: value for name, value in given.items() if value is not None})
    assert code in (2, 3) and said in err, err


@pytest.mark.parametrize("column", ["user", None])
def test_people_whose_rows_are_at_several_clients_are_warned_of(recipe, column, logged):
    people = dict(privacy_unit_column=column, rows_per_unit=3, expected_batch_size=4, target_delta=1e-2)
    code, _, err = recipe("dp", dry_run="true", **(people if column else {}))
    assert code == 0, err
    said = [record.getMessage() for record in logged.records if "rows at several clients" in record.getMessage()]
    assert len(said) == (1 if column else 0)
    assert all("20 values of user have rows at several clients" in text for text in said)


def test_several_processes_are_refused(recipe, monkeypatch):
    monkeypatch.setattr("posttrain.recipe.federated.processes", lambda: 2)
    code, _, err = recipe()
    assert code == 2 and "the run was launched on 2 processes, and clients take turns" in err


def test_curves_have_what_a_round_tells_and_lines_of_many_clients_become_three(tmp_path):
    def report(round, clients):
        told = {
            f"c{number}": dict(loss=number + round, update_norm=1.0, epsilon=None, rows=3) for number in range(clients)
        }
        return dict(
            round=round, loss=2.0, clients=told, evaluation={"loss": None if round == 1 else 3.0}, bytes_up=2e6,
            bytes_down=4e6, singular_values={"q": [3.0, 1.0], "v": [2.0, 0.5]}, orthonormality=1e-7,
        )  # fmt: skip

    panels = curves.panels_of([report(1, 2), report(2, 2)])
    assert list(panels) == ["loss", "update_norm", "MB", "singular values", "||A A^T - I||", "evaluation loss"]
    assert panels["loss"] == {
        "c0": [(1, 1), (2, 2)], "c1": [(1, 2), (2, 3)], "weighted": [(1, 2.0), (2, 2.0)],
    }  # fmt: skip
    assert panels["singular values"] == {"greatest": [(1, 3.0), (2, 3.0)], "least": [(1, 0.5), (2, 0.5)]}
    assert panels["evaluation loss"] == {"evaluation": [(2, 3.0)]} and panels["MB"]["up"] == [(1, 2.0), (2, 2.0)]
    many = curves.panels_of([report(1, 20)])["loss"]
    assert many == {"least": [(1, 1)], "mean": [(1, 10.5)], "greatest": [(1, 20)], "weighted": [(1, 2.0)]}
