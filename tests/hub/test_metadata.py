"""The metadata of a card: what is written into it, and what of a person's own is kept."""

import math

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from posttrain.errors import DataError
from posttrain.hub import Destination
from posttrain.hub.files import published_card
from posttrain.hub.metadata import eval_results, last_evaluation, parse_card, read_metadata, render_card

DESTINATION = Destination("me/robust", "org/base", {"license": "mit"})
MINE = """---
license: gemma
language: [de, en]
my-own: {list: [1, 2.5], when: 2024-05-01}
model-index:
- name: run
  results:
  - task: {type: text-generation, name: Chat}
    dataset: {type: org/a, name: A, split: test}
    metrics: [{type: accuracy, value: "20.0 ± 1.2", stderr: 1.2}]
    source: {name: A board}
- name: another model
  results: []
---

# run

<!-- a note of mine -->

---

Mine: äöü
"""


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_persons_own_metadata_and_evaluations_survive_a_push():
    before = metadata_of(MINE)
    card = published_card(MINE, DESTINATION, True, {}, title="run")
    after = metadata_of(card)
    before["model-index"][0]["name"] = "robust"
    assert {key: after[key] for key in before} == before
    assert after["base_model"] == "org/base" and after["library_name"] == "peft"
    assert card.endswith("# robust\n\n<!-- a note of mine -->\n\n---\n\nMine: äöü\n")
    assert published_card(card, DESTINATION, True, {}, title="run") == card


@pytest.mark.parametrize("text", ["", "# no metadata\n", "---\n---\n# none\n", "---\n# only a comment\n---\n"])
def test_a_card_without_metadata_gets_some(text):
    assert metadata_of(published_card(text, DESTINATION, True, {}))["license"] == "mit"


@pytest.mark.parametrize("block", ["a: [1,", "- a list", "only a text", "1: a number", "a: b: c"])
def test_metadata_that_cannot_be_read_is_refused_with_its_file(block, tmp_path):
    text = f"---\n{block}\n---\n# mine\n"
    with pytest.raises(DataError, match=r"the metadata of run/README.md, between its two lines of ---, is no valid"):
        parse_card(text, "run/README.md")
    (tmp_path / "README.md").write_text(text)
    assert read_metadata(tmp_path / "README.md") == {}


def test_evaluations_are_read_back_by_the_hubs_client():
    metrics = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_bad": math.nan, "eval_worse": math.inf}
    results = eval_results(metrics, (), "org/pairs", "test")
    card = ModelCard(render_card(ModelCardData(model_name="run", eval_results=results), "# run\n"))
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ("loss", "eval_loss", 0.5),
        ("rewards/accuracies", "eval_rewards/accuracies", 0.75),
    ]
    result = card.data.eval_results[0]
    assert (result.task_type, result.dataset_type, result.dataset_name, result.dataset_split) == (
        "text-generation",
        "org/pairs",
        "org/pairs",
        "test",
    )


def test_several_evaluation_sets_are_told_apart_by_their_longest_name():
    results = eval_results({"eval_easy_loss": 1.0, "eval_easy_2_loss": 2.0}, ("easy", "easy_2"))
    card = ModelCard(render_card(ModelCardData(model_name="run", eval_results=results), ""))
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {("easy", "loss"): 1.0, ("easy_2", "loss"): 2.0}


def test_the_last_evaluation_has_no_times_and_no_earlier_step():
    history = [{"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_a_loss": 0.5}]
    history.append({"step": 2, "eval_b_loss": 0.25, "eval_b_runtime": 1.0, "eval_b_samples_per_second": 2.0})
    assert last_evaluation(history) == (2, {"eval_a_loss": 0.5, "eval_b_loss": 0.25})
    assert last_evaluation([{"step": 1, "loss": 1.0}]) is None
