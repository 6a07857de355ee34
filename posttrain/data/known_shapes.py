"""The table of published shapes: the columns that tell each one, and the rows of ours that one of its rows becomes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.data.messages import is_messages
from posttrain.data.pairs.faults import without_answer
from posttrain.errors import DataError
from posttrain.rewards.golds import gold_text, is_missing

# What a shape's rows become: prompt, chosen, rejected; prompt, completion, reward; prompt, gold
PAIRS, ANSWERS, TASKS = "pairs", "answers", "tasks"
# Pairs that need no conversion but where a column prompt is needed
WHOLE = "pairs with a prompt"
_SPEAKERS = {"Human": "user", "User": "user", "Assistant": "assistant"}


class LeftOut(Exception):
    """A row that says nothing of the kind that is asked for, with the reason."""


@dataclass(frozen=True)
class Shape:
    """Columns that tell a published data set, and the conversion of its rows.

    Attributes:
        name: a data set that has it. kind: what its rows become. columns: those it must have; without: must not.
        fits: whether a first row with these columns is of it.
        convert: the rows of ours that a row becomes, of the columns that differ; `LeftOut` for one that says nothing.
        reads: how, in words. unscored: how many of a row's answers are left out since they have no score.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    fits: Callable[[Mapping], bool]
    convert: Callable[[Mapping], list[dict]]
    reads: str
    without: tuple[str, ...] = ()
    unscored: Callable[[Mapping], int] = lambda row: 0

    @property
    def why(self) -> str:
        """The columns that tell it, and how they are read."""
        return f"columns {', '.join(self.columns)}: {self.reads}" if self.columns else self.reads


def _said(role: str, text) -> dict:
    if not isinstance(text, str):
        raise TypeError(f"a text is missing; found {text!r}")
    return {"role": role, "content": text}


def _pair(prompt, better, worse, **others) -> list[dict]:
    """Make a pair of a prompt, which is a text or messages, and two answers, which are texts or messages."""
    prompt = prompt if isinstance(prompt, list) else [_said("user", prompt)]
    sides = [side if isinstance(side, list) else [_said("assistant", side)] for side in (better, worse)]
    return [{"prompt": prompt, "chosen": sides[0], "rejected": sides[1], **others}]


def _split(chosen: list, rejected: list) -> list[dict]:
    """Make a pair of two whole conversations: what they share up to a turn of the user is the prompt."""
    if not is_messages(chosen) or not is_messages(rejected):
        raise TypeError("a side is no conversation")
    unanswered = without_answer(chosen, rejected)
    if unanswered is not None:
        raise LeftOut(f"{unanswered} {'have' if unanswered == 'both' else 'has'} no answer, but the prompt alone")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise LeftOut("the two conversations do not begin with the same message")
    return _pair(chosen[:shared], chosen[shared:], rejected[shared:])


def transcript(text: str) -> list[dict]:
    """Return the messages of a text like `\\n\\nHuman: Hello\\n\\nAssistant: Hi`.

    Turns of one speaker in a row are joined.

    An open turn of the assistant at the end is left out. Raises ValueError for a text that does not begin so.
    """
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", "\n\n" + text.lstrip())
    if before.strip() or not parts:
        raise ValueError(f"a transcript begins with 'Human:', not {text[:40]!r}")
    messages: list[dict] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = _SPEAKERS[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{said}"
        else:
            messages.append(_said(role, said))
    return messages


def _open_transcript(text: str) -> list[dict]:
    """Return the messages of a transcript that ends where the assistant is to speak."""
    messages = transcript(text)
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


def _behind(prompt: str, answer: str) -> str:
    """Return an answer without the prompt, which some copies put in front of it once more."""
    return answer.strip().removeprefix(prompt.strip()).strip()


def _is_transcript(value, is_open: bool = False) -> bool:
    if not isinstance(value, str) or not value.lstrip().startswith("Human:") or "\n\nAssistant:" not in value:
        return False
    return not is_open or value.rstrip().endswith("\n\nAssistant:")


def _whole(row: Mapping) -> bool:
    """Tell whether both sides are conversations that begin with the prompt."""
    return all(is_messages(row[side]) and len(row[side]) > 1 for side in ("chosen", "rejected"))


def _begins_with_its_prompt(row: Mapping) -> bool:
    if not isinstance(row["prompt"], str) or not _whole(row):
        return False
    asked = [m["content"] for m in row["chosen"] if m["role"] == "user" and isinstance(m.get("content"), str)]
    return row["prompt"].strip() in [text.strip() for text in asked]


def _split_with_its_prompt(row: Mapping) -> list[dict]:
    if _whole(row) and not _begins_with_its_prompt(row):
        raise LeftOut("the prompt does not stand in the conversations")
    return _split(row["chosen"], row["rejected"])


def _messages_answer_a_text(row: Mapping) -> bool:
    sides = row["chosen"], row["rejected"]
    return isinstance(row["prompt"], str) and all(is_messages(side) and _is_answer(side) for side in sides)


def _is_answer(side) -> bool:
    """Tell whether a side is a text, or messages that begin with the assistant's."""
    return isinstance(side, str) or (is_messages(side) and side[0]["role"] == "assistant")


def _are_texts(*columns: str) -> Callable[[Mapping], bool]:
    return lambda row: all(isinstance(row[column], str) for column in columns)


def _number(value, name: str) -> float:
    """Read a score; a text of digits counts. Raises DataError for null, NaN and what is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        shown = "null" if value is None else repr(value)
        raise DataError(f"{name} is {shown}; it must be a number. Fill it in, or leave the row out.")
    return number


def _has_score(one: Mapping) -> bool:
    """Tell whether an answer of UltraFeedback's has a score: of some, the judge gave none, or N/A."""
    return not is_missing(one["overall_score"]) and one["overall_score"] != "N/A"


def _unscored_completions(row: Mapping) -> int:
    return sum(not _has_score(one) for one in row["completions"])


def _scored_completions(row: Mapping, least: int = 2) -> list[tuple[float, str]]:
    answers = [one for one in row["completions"] if _has_score(one)]
    if len(answers) < least:
        raise LeftOut("fewer than two answers" if len(answers) == len(row["completions"]) else "too few have a score")
    return [(_number(one["overall_score"], "overall_score"), one["response"]) for one in answers]


def _best_and_worst(prompt, answers: Sequence[tuple[float, str]], is_rank: bool = False) -> list[dict]:
    """Return the pair of the best and the worst answer; `is_rank`: the least number is the best."""
    ordered = sorted(answers, key=lambda answer: answer[0] if is_rank else -answer[0])
    (best, better), (worst, worse) = ordered[0], ordered[-1]
    if best == worst:
        raise LeftOut("all answers are as good")
    scores = {} if is_rank else {"chosen_reward": best, "rejected_reward": worst}
    return _pair(prompt, better, worse, **scores)


def _by_index(row: Mapping, names: Sequence[str], better, scores: Sequence[str] = ()) -> list[dict]:
    """Return the pair of two columns of which `better` (0 or 1) says which one is chosen."""
    if better not in (0, 1):
        raise ValueError(f"the better answer is {better!r}, not 0 or 1")
    order = (int(better), 1 - int(better))
    rewards = {}
    if scores:
        rewards = dict(
            zip(("chosen_reward", "rejected_reward"), (_number(row[scores[i]], scores[i]) for i in order), strict=True)
        )
    return _pair(row[_prompt_column(row)], row[names[order[0]]], row[names[order[1]]], **rewards)


def _prompt_column(row: Mapping) -> str:
    return next(name for name in ("prompt", "history", "question", "instruction", "input") if name in row)


def _by_score(row: Mapping, prompt: str, names: Sequence[str], scores: Sequence[str]) -> list[dict]:
    first, second = (_number(row[score], score) for score in scores)
    if first == second:
        raise LeftOut("both answers have the same score")
    best, worst = (0, 1) if first > second else (1, 0)
    rewards = {"chosen_reward": max(first, second), "rejected_reward": min(first, second)}
    return _pair(prompt, row[names[best]], row[names[worst]], **rewards)


def _asked(column: str, chosen: str = "chosen", rejected: str = "rejected") -> Callable[[Mapping], list[dict]]:
    """Read pairs whose prompt is a column of its own."""
    return lambda row: _pair(row[column], row[chosen], row[rejected])


def _of_helpsteer(text: str) -> list[dict]:
    """Read HelpSteer's prompts: further turns stand behind marks in the text."""
    first, *parts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", text)
    turns = [_said(_SPEAKERS[who], said) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    while turns and not turns[-1]["content"]:
        turns.pop()
    return [_said("user", first), *turns]


def _shp(row: Mapping) -> list[dict]:
    if row["labels"] not in (0, 1):
        raise ValueError(f"labels is {row['labels']!r}, not 0 or 1")
    scores = ("score_A", "score_B") if {"score_A", "score_B"} <= set(row) else ()
    return _by_index(row, ("human_ref_A", "human_ref_B"), 1 - int(row["labels"]), scores)


def _helpsteer3(row: Mapping) -> list[dict]:
    if row["overall_preference"] == 0:
        raise LeftOut("both answers are as good")
    return _by_index(
        {**row, "prompt": list(row["context"])}, ("response1", "response2"), int(row["overall_preference"] > 0)
    )


def _arena(row: Mapping) -> list[dict]:
    sides = {"model_a": ("conversation_a", "conversation_b"), "model_b": ("conversation_b", "conversation_a")}
    if row["winner"] not in sides:
        raise LeftOut("neither answer wins")
    return _split(*(list(row[column]) for column in sides[row["winner"]]))


def _answer_row(prompt, response: str, reward) -> dict:
    prompt = prompt if isinstance(prompt, list) else [_said("user", prompt)]
    return {"prompt": prompt, "completion": [_said("assistant", response)], "reward": reward}


def _ground_truth(reward_model: Mapping) -> str:
    return gold_text(reward_model["ground_truth"], "reward_model.ground_truth")


def anything(row: Mapping) -> bool:
    return True


_NO_PROMPT = ("prompt", "instruction", "conversations", "prompt_ids")

SHAPES = (
    Shape(
        "UltraFeedback binarized", PAIRS, ("prompt", "chosen", "rejected"), _begins_with_its_prompt,
        _split_with_its_prompt,
        "whole conversations that begin with the prompt, which is taken from them",
    ),
    Shape(
        "text prompt, answers as messages", PAIRS, ("prompt", "chosen", "rejected"), _messages_answer_a_text,
        lambda row: _pair(row["prompt"], row["chosen"], row["rejected"]),
        "the prompt becomes the user's message",
    ),
    Shape(
        "UltraFeedback", PAIRS, ("instruction", "completions"), lambda row: _has(row["completions"], "overall_score"),
        lambda row: _best_and_worst(row["instruction"], _scored_completions(row)),
        "the answers of the highest and the lowest overall_score", unscored=_unscored_completions,
    ),
    Shape(
        "UltraFeedback", ANSWERS, ("instruction", "completions"), lambda row: _has(row["completions"], "overall_score"),
        lambda row: [_answer_row(row["instruction"], text, score) for score, text in _scored_completions(row, 1)],
        "every answer with its overall_score", unscored=_unscored_completions,
    ),
    Shape(
        "HH-RLHF", PAIRS, ("chosen", "rejected"),
        lambda row: _is_transcript(row["chosen"]) and _is_transcript(row["rejected"]),
        lambda row: _split(transcript(row["chosen"]), transcript(row["rejected"])),
        "transcripts of Human and Assistant, split where they part", without=("prompt", "prompt_ids"),
    ),
    Shape(
        "HH-RLHF with prompts", PAIRS, ("prompt", "chosen", "rejected"),
        lambda row: _is_transcript(row["prompt"], is_open=True) and _are_texts("chosen", "rejected")(row),
        lambda row: _pair(
            _open_transcript(row["prompt"]), *(_behind(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        ),
        "a transcript of Human and Assistant, and two answers",
    ),
    *(
        Shape(
            "Orca DPO pairs", PAIRS, (column, "chosen", "rejected"),
            lambda row, column=column: (
                isinstance(row[column], str) and _is_answer(row["chosen"]) and _is_answer(row["rejected"])
            ),
            _asked(column), f"{column} becomes the user's message", without=(*_NO_PROMPT, other),
        )
        for column, other in (("question", "input"), ("input", "question"))
    ),
    *(
        Shape(
            "distilabel pairs", PAIRS, (column, "chosen_response", "rejected_response"),
            _are_texts(column, "chosen_response", "rejected_response"),
            _asked(column, "chosen_response", "rejected_response"), f"{column} becomes the user's message",
            without=("chosen", "rejected", *({"prompt", "instruction"} - {column})),
        )
        for column in ("instruction", "prompt")
    ),
    Shape(
        "SHP", PAIRS, ("history", "human_ref_A", "human_ref_B", "labels"), anything,
        _shp,
        "labels 1 prefers A, 0 prefers B",
    ),
    Shape(
        "PKU-SafeRLHF", PAIRS, ("prompt", "response_0", "response_1", "better_response_id"), anything,
        lambda row: _by_index(row, ("response_0", "response_1"), row["better_response_id"]),
        "better_response_id says which answer is chosen; safer_response_id is not read",
    ),
    Shape(
        "HelpSteer", ANSWERS, ("prompt", "response", "helpfulness"), _are_texts("prompt", "response"),
        lambda row: [
            _answer_row(_of_helpsteer(row["prompt"]), row["response"], _number(row["helpfulness"], "helpfulness"))
        ],
        "helpfulness is the reward", without=("completion", "reward"),
    ),
    Shape(
        "HelpSteer3", PAIRS, ("context", "response1", "response2", "overall_preference"),
        lambda row: is_messages(row["context"]), _helpsteer3, "overall_preference below 0 prefers response1",
    ),
    Shape(
        "Nectar", PAIRS, ("prompt", "answers"),
        lambda row: isinstance(row["prompt"], str) and _has(row["answers"], "answer", "rank"),
        lambda row: _best_and_worst(
            _open_transcript(row["prompt"]) if _is_transcript(row["prompt"]) else row["prompt"],
            [(_number(one["rank"], "rank"), one["answer"]) for one in row["answers"]], is_rank=True,
        ),
        "the answers of the first and the last rank",
    ),
    Shape(
        "Stack Exchange pairs", PAIRS, ("question", "response_j", "response_k"),
        _are_texts("question", "response_j", "response_k"),
        lambda row: _pair(row["question"], row["response_j"], row["response_k"]), "response_j is the better answer",
    ),
    Shape(
        "WebGPT comparisons", PAIRS, ("question", "answer_0", "answer_1", "score_0", "score_1"), anything,
        lambda row: _by_score(
            row, row["question"]["full_text"] if isinstance(row["question"], Mapping) else row["question"],
            ("answer_0", "answer_1"), ("score_0", "score_1"),
        ),
        "the answer with the higher score is chosen",
    ),
    Shape(
        "Chatbot Arena", PAIRS, ("conversation_a", "conversation_b", "winner"),
        lambda row: is_messages(row["conversation_a"]), _arena, "winner says which conversation is chosen",
    ),
    Shape(
        "whole conversations", WHOLE, ("chosen", "rejected"), _whole,
        lambda row: _split(row["chosen"], row["rejected"]), "what both sides share is the prompt",
        without=("prompt", "prompt_ids"),
    ),
    Shape(
        "verl tasks", TASKS, ("prompt", "reward_model"),
        lambda row: is_messages(row["prompt"]) and _has(row["reward_model"], "ground_truth"),
        lambda row: [{"prompt": row["prompt"], "gold": _ground_truth(row["reward_model"])}],
        "reward_model.ground_truth is the gold answer", without=("gold",),
    ),
    Shape(
        "RLVR tasks", TASKS, ("messages", "ground_truth"),
        lambda row: is_messages(row["messages"]) and row["messages"][-1]["role"] == "user",
        lambda row: [{"prompt": row["messages"], "gold": gold_text(row["ground_truth"], "ground_truth")}],
        "messages are the prompt, ground_truth is the gold answer", without=("prompt", "gold"),
    ),
)  # fmt: skip


def _has(value, *keys: str) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and all(key in first for key in keys)
