"""Special tokens that a reward looks for are in the text that it is given; all others are not, as in TRL."""

import re
from functools import partial

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer
from trl.chat_template_utils import add_response_schema
from trl.rewards import think_format_reward

from posttrain import PolicyGradientConfig, PolicyGradientTrainer
from posttrain.errors import ConfigError
from posttrain.models import byte_tokenizer, tiny_model
from posttrain.rewards import Format, get_rewards
from posttrain.rewards.reads import texts_of
from tests import rollouts
from tests.rollouts import entries

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "[THINK]"]
ANSWER = "<think>two and two</think>4"
PATTERN, TAG = re.compile(r"<think\>"), "</think>"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def with_tags(special=True):
    tokenizer = byte_tokenizer("<|pad|>")
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    else:
        tokenizer.add_tokens(TAGS)
    return tokenizer


def run(output_dir, reward, tokenizer=None, text=ANSWER, in_turns=True, kind=PolicyGradientTrainer, **fields):
    """One step on rollouts that all say `text`; the trainer."""
    tokenizer = tokenizer or with_tags()
    prompt = [{"role": "user", "content": "2+2="}] if in_turns else "2+2="
    config = PolicyGradientConfig(**rollouts.settings(output_dir, max_steps=1, max_completion_length=64, **fields))

    def say(prompts, trainer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"prompt_ids": [[65]] * len(prompts), "completion_ids": [list(ids) for _ in prompts], "logprobs": None}

    trainer = kind(
        tiny_model(vocab_size=len(tokenizer)),
        reward,
        config,
        Dataset.from_list([{"prompt": prompt, "gold": "4"}] * 8),
        processing_class=tokenizer,
        rollout_func=say,
    )
    trainer.train()
    return trainer


def seen_by(*rewards, **fields) -> str:
    seen = []

    def look(completions, **columns):
        seen.extend(one if isinstance(one, str) else one[0]["content"] for one in completions)
        return [1.0] * len(completions)

    run(reward=[look, *rewards], **fields)
    (text,) = set(seen)
    return text


@pytest.mark.parametrize("in_turns", [True, False])
def test_a_format_that_is_there_is_rewarded_where_its_tags_are_special_tokens(tmp_path, in_turns):
    trainer = run(tmp_path, ["format?template=think", "maths_answer?engine=numbers"], in_turns=in_turns)
    assert entries(trainer)[0]["rewards/format/mean"] == 1.0
    assert entries(trainer)[0]["rewards/maths_answer/mean"] == 1.0, "the 2 of the thinking is no answer"


def test_an_answer_is_found_by_tags_that_are_special_tokens(tmp_path):
    text = "<answer>4</answer> or rather, 5 would do"
    trainer = run(tmp_path, ["maths_answer?engine=numbers", "exact_match?answer_in=tag"], text=text)
    row = entries(trainer)[0]
    assert (row["rewards/maths_answer/mean"], row["rewards/exact_match/mean"]) == (1.0, 1.0)


def named_in_code(completions, **columns):
    return [float(one[0]["content"].startswith("<think>")) for one in completions]


def named_by_a_pattern(completions, **columns):
    return [float(PATTERN.match(one[0]["content"]) is not None) for one in completions]


def named_in_a_helper(completions, **columns):
    return [_closed(one[0]["content"]) for one in completions]


def _closed(text):
    return float(TAG in text)


def named_as_an_argument(completions, tag, **columns):
    return [float(tag in one[0]["content"]) for one in completions]


class Settings:
    def __init__(self):
        self.tags = {"open": "<think>"}

    def __call__(self, completions, **columns):
        return [float(self.tags["open"] in one[0]["content"]) for one in completions]

    def method(self, completions, **columns):
        return self(completions, **columns)


async def waits(completions, **columns):
    return [float("</think>" in one[0]["content"]) for one in completions]


FUNCTIONS = [
    named_in_code, named_by_a_pattern, named_in_a_helper, partial(named_as_an_argument, tag="<think>"), Settings(),
    Settings().method, waits, think_format_reward,
]  # fmt: skip


@pytest.mark.core("0", "5")
@pytest.mark.parametrize("function", FUNCTIONS, ids=range(len(FUNCTIONS)))
def test_a_users_function_is_given_the_tokens_that_it_names(tmp_path, function):
    row = entries(run(tmp_path, function))[0]
    assert row["reward"] == 1.0


def test_what_no_reward_names_is_left_out_and_said_once(tmp_path, logged):
    def length(completions, **columns):
        "Says nothing of <think>."
        return [float(len(one[0]["content"])) for one in completions]

    assert entries(run(tmp_path / "a", length))[0]["reward"] == len("two and two4")
    said = [record.message for record in logged.records if "left out of the text" in record.message]
    assert len(said) == 1 and "</think>, <think>" in said[0] and "kept_tokens" in said[0]
    logged.clear()
    assert entries(run(tmp_path / "b", length, text="plain"))[0]["reward"] == 5
    assert "left out" not in logged.text


@pytest.mark.slow
def test_the_end_and_the_padding_are_never_kept_unasked(tmp_path):
    def strips(completions, **columns):
        return [float(len(one[0]["content"].replace("<|im_end|>", "").replace("<|pad|>", ""))) for one in completions]

    assert seen_by(strips, output_dir=tmp_path / "a", text="yes") == "yes"
    end = byte_tokenizer().eos_token
    assert seen_by(output_dir=tmp_path / "b", text="yes", kept_tokens=[end]) == f"yes{end}"


@pytest.mark.parametrize(("kept", "text"), [([], "ab"), (["[THINK]"], "[THINK]ab"), (["<think>", "[THINK]"], None)])
def test_the_setting_has_the_last_word(tmp_path, kept, text):
    given = "[THINK]a<think>b"
    assert seen_by("format?template=think", output_dir=tmp_path, text=given, kept_tokens=kept) == (text or given)


def test_a_kept_token_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="kept_tokens names '<thnik>', which is no token.*</think>, <answer>"):
        run(tmp_path, "format", kept_tokens=["<thnik>"])
    with pytest.raises(ConfigError, match="kept_tokens is '<think>'; it takes a list of texts or null"):
        run(tmp_path, "format", kept_tokens="<think>")


def test_tags_that_are_ordinary_tokens_are_in_the_text_anyway(tmp_path):
    trainer = run(tmp_path, Format("think"), tokenizer=with_tags(special=False))
    assert not trainer._kept_tokens._kept and entries(trainer)[0]["reward"] == 1.0


def test_a_parsed_reply_is_left_as_it_was_parsed(tmp_path):
    tokenizer, seen = add_response_schema_of("qwen3"), []

    def look(completions, **columns):
        seen.append(completions[0])
        return [1.0] * len(completions)

    trainer = run(tmp_path, [look, "format?template=think", "format?template=answer"], tokenizer=tokenizer)
    assert seen[0] == [{"role": "assistant", "reasoning_content": "two and two", "content": "4"}]
    functions = trainer.reward_funcs[1:]
    # reasoning that the template takes out of the content is part of the form
    assert [function(completions=seen[:1]) for function in functions] == [[1.0], [0.0]]
    parsed = [{"role": "assistant", "reasoning_content": "hm", "content": "so <answer>4</answer>"}]
    think, whole, answer = get_rewards(
        ["format?template=think", "format?template=think_answer", "format?template=answer"]
    )
    assert [reward(completions=[parsed]) for reward in (think, answer)] == [[0.0], [1.0]]
    parsed[0]["content"] = "<answer>4</answer>"
    assert whole(completions=[parsed]) == [1.0]
    assert think(completions=[[{"role": "assistant", "reasoning_content": "only", "content": ""}]]) == [0.0]


def add_response_schema_of(name):
    from pathlib import Path

    import trl

    tokenizer = with_tags()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    return add_response_schema(tokenizer)


def test_without_a_name_the_run_is_trls_bit_for_bit(tmp_path):
    def length(completions, completion_ids, **columns):
        return [
            len(one[0]["content"]) + len(set(ids)) / 10 for one, ids in zip(completions, completion_ids, strict=True)
        ]

    from trl import GRPOConfig

    changes = []
    for kind, config, off in (
        (GRPOTrainer, GRPOConfig, {}),
        (PolicyGradientTrainer, PolicyGradientConfig, dict(prefix_sharing="never", drop_zero_advantage_rows=False)),
    ):
        tokenizer = with_tags()
        model = tiny_model(vocab_size=len(tokenizer))
        with torch.no_grad():
            # <think> and its end come up often
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(TAGS[:2])] *= 40
        before = model.lm_head.weight.detach().clone()
        fields = rollouts.settings(tmp_path / kind.__name__, max_completion_length=8, **off)
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(8)])
        trainer = kind(model, length, config(**fields), data, processing_class=tokenizer)
        trainer.train()
        changes.append((model.lm_head.weight.detach() - before, [row["reward"] for row in entries(trainer)]))
    (theirs, rewards), (ours, our_rewards) = changes
    assert rewards == our_rewards and torch.equal(theirs, ours) and ours.any()


def test_texts_are_found_where_code_can_hold_them():
    def outer(completions, default="<a>", *, only="<b>"):
        "<doc>"

        def inner():
            return "<c>" + late

        late = "<d>"
        return inner(), [one for one in completions if "<e>" in one]

    found = texts_of(outer)
    assert {"<a>", "<b>", "<c>", "<e>", "<d>"} <= found and "<doc>" not in found
    assert {"<x>", "<y>", "<z>"} <= texts_of(partial(named_as_an_argument, "<x>", tag={"<y>": ("<z>",)}))
    assert texts_of(len) == set() and texts_of(re.compile) == set()
    # an object that a function refers to is not searched: a tokenizer holds all of its special tokens
    tokenizer = with_tags()
    assert "<think>" not in texts_of(lambda completions: tokenizer(completions))
