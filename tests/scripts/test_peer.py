"""The script that runs TRL's tests on our trainers: what it says of a wrong folder, and what it counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import peer_tests  # noqa: E402
from peer import models, rows  # noqa: E402

# One passes with both classes, one with TRL's alone, one with neither, one is skipped.
TESTS = """
import pytest
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

MODEL = "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"


def build(folder, **settings):
    rows = load_dataset("trl-internal-testing/zen", "standard_preference", split="train")
    args = DPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **settings)
    return DPOTrainer(MODEL, args=args, train_dataset=rows)


class TestDPOTrainer:
    def test_is_built(self, tmp_path):
        assert len(build(tmp_path).train_dataset) == 17

    def test_other_loss(self, tmp_path):
        assert build(tmp_path, loss_type="apo_zero").loss_types == ["apo_zero"]

    def test_model_of_the_hub(self):
        load_dataset("no-such/data-set")

    @pytest.mark.skip(reason="needs a GPU")
    def test_gpu(self):
        pass
"""


def test_a_missing_folder_is_answered_plainly(tmp_path, capsys):
    assert peer_tests.main(["--tests", str(tmp_path / "gone")]) == 2
    assert "gone, which is no folder; give the folder `tests` of a checkout of TRL." in capsys.readouterr().err
    assert peer_tests.main(["--tests", str(tmp_path)]) == 2
    assert "has no test_dpo_trainer.py; give the folder" in capsys.readouterr().err
    assert peer_tests.main(["--tests", str(tmp_path), "--files", "test_kto_trainer.py"]) == 2
    assert "those with a trainer of ours are test_dpo_trainer.py, test_grpo_trainer.py." in capsys.readouterr().err
    (tmp_path / "test_dpo_trainer.py").touch()
    given = ["--tests", str(tmp_path), "--files", "test_dpo_trainer.py"]
    assert peer_tests.main([*given, "--known", str(tmp_path / "old.json")]) == 2
    assert "old.json, which is no file; give what an earlier --json wrote." in capsys.readouterr().err
    assert peer_tests.main([*given, "--json", str(tmp_path / "gone" / "new.json")]) == 2
    assert "new.json, whose folder is not there; make it first." in capsys.readouterr().err


def test_a_test_counts_where_it_passes_with_trls_own_class():
    passed, failed = {"outcome": "passed"}, {"outcome": "failed", "reason": "KeyError: 'x'"}
    skipped = {"outcome": "skipped", "reason": "Skipped: needs vllm"}
    theirs = {"a": passed, "b": passed, "c": failed, "d": skipped, "e": passed}
    ours = {"a": passed, "b": failed, "c": passed, "d": skipped}
    assert peer_tests.compare(theirs, ours) == {"both": ["a"], "differ": ["b", "e"], "apart": ["c"], "skipped": ["d"]}
    text = peer_tests.report({"test_dpo_trainer.py": {"theirs": theirs, "ours": ours}}, {"tiny-X": "ValueError: y"})
    assert "| test_dpo_trainer.py | 3 | 1 | 0 | 2 |" in text
    assert "- b: KeyError: 'x'\n- e: did not run" in text and "- c: KeyError: 'x'" in text
    assert "- 1 x Skipped: needs vllm" in text and "- tiny-X: ValueError: y" in text


@pytest.mark.parametrize("name", ["tiny-Qwen2ForCausalLM-2.5", "tiny-LlamaForCausalLM-3.2", "tiny-GptOssForCausalLM"])
def test_a_tokenizer_knows_its_familys_turns(name):
    tokenizer = models.tokenizer_of(models.MODELS[name], rows.texts())
    talk = rows.zen()["conversational_prompt_completion"][0]
    text = tokenizer.apply_chat_template(talk["prompt"] + talk["completion"], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and talk["completion"][0]["content"] in text
    assert tokenizer.eos_token_id in tokenizer.all_special_ids


def test_every_format_has_nineteen_rows_of_one_shape():
    for named in (rows.zen(), rows.toolcall(), rows.harmony()):
        for name, found in named.items():
            assert len(found) == 19 and len({tuple(row) for row in found}) == 1, name


@pytest.mark.slow
def test_a_folder_of_tests_is_run_with_both_classes(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "test_dpo_trainer.py").write_text(TESTS)
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, ROOT / "scripts/peer_tests.py", "--tests", folder, "--files", "test_dpo_trainer.py"]
    done = subprocess.run([*command, "--json", tmp_path / "out.json"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "| test_dpo_trainer.py | 2 | 1 | 1 | 0 |" in done.stdout
    assert "- TestDPOTrainer::test_other_loss: posttrain.errors.ConfigError: loss_type is apo_zero" in done.stdout
    assert "- TestDPOTrainer::test_model_of_the_hub: " in done.stdout and "1 x Skipped: needs a GPU" in done.stdout
    sides = json.loads((tmp_path / "out.json").read_text())["results"]["test_dpo_trainer.py"]
    assert sides["ours"]["TestDPOTrainer::test_is_built"]["outcome"] == "passed"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "out.json"]), "nothing is written there"
