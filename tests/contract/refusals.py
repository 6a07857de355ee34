"""Settings, files and data that are refused, each with what is to refuse it. `messages.txt` has what is then said.

The models have no weights to load: what is refused was refused before. An adapter on a module that is not there alone
needs them.
"""

import functools
import math
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig

from posttrain import (
    ALoLConfig,
    ALoLTrainer,
    PolicyGradientConfig,
    PolicyGradientTrainer,
    RobustDPOConfig,
    RobustDPOTrainer,
)
from posttrain.config import parse
from posttrain.errors import PosttrainError
from posttrain.federated import partitions
from posttrain.federated.config import FederatedConfig
from posttrain.models import byte_tokenizer, tiny_model
from posttrain.recipe import preferences, scored_answers, tasks
from tests import rollouts, scored, training
from tests.conftest import make_pairs
from tests.families import METHODS
from tests.federated import refused as federated
from tests.federated import synthetic
from tests.recipe.in_process import PAIRS, lines, robust_dpo
from tests.scored import beyond, make_scored
from tests.test_config import Toy


class Case(NamedTuple):
    """What is refused, and what refuses it when it is given a folder of its own to write in."""

    title: str
    build: Callable[[Path], object]


class Ended(PosttrainError):
    """A recipe's process ended with this code and text."""


def refused(build, folder: Path) -> PosttrainError:
    try:
        build(folder)
    except PosttrainError as error:
        return error
    raise AssertionError("It is not refused.")


def alike(*builds):
    """Raise what each of these raises, in the same words."""

    def build(folder):
        first, *others = (refused(one, folder) for one in builds)
        assert all(str(other) == str(first) for other in others), [str(first), *map(str, others)]
        raise first

    return build


def leaves_nothing(build):
    """Raise what this raises, and see that there is no folder of a run."""

    def checked(folder):
        error = refused(build, folder)
        assert not (folder / "run").exists()
        raise error

    return checked


def model(folder: Path, architecture: str = "llama", special=(), weights: bool = False, **settings) -> str:
    """Give a folder with a tiny model's config and tokenizer, by default without its weights. All cases share it."""
    path = folder.parent / "-".join(["model", architecture, *["longer"] * bool(special), *["weights"] * weights])
    if not path.exists():
        made = tiny_model(architecture, **settings)
        (made if weights else made.config).save_pretrained(path)
        tokenizer = byte_tokenizer()
        if special:
            tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.save_pretrained(path)
    return str(path)


# settings


def _config(method: str, fields: dict, folder: Path):
    rollouts = dict(num_generations=4, per_device_train_batch_size=16) if method == "policy_gradient" else {}
    build = METHODS[method].given or METHODS[method].config
    build(str(folder), use_cpu=True, bf16=False, **rollouts | fields)


def _file(text: str, folder: Path):
    path = folder / "run.yaml"
    path.write_text(text)
    parse((Toy,), ["--config", str(path)])


def _command_line(arguments: list[str], folder: Path):
    parse((Toy,), arguments)


FILES = [
    "rate: 0.1\nstep: 3",
    "zzzz: 3",
    "\nwarmup_ratio: 0.1",
    "rate: 1\nmode: a\nrate: 0.2",
    "extra:\n  a: 1\n  a: 2",
    "steps: 2.5",
    "steps: true",
    "steps:",
    "rate: high",
    "ratio: high",
    "rate: [1]",
    "share: maybe",
    "names: {a: 1}",
    "kind: c",
    "mode: off",
    "- 1",
    "rate: [1",
    "rate: 1\nenv: 3",
    "rate: 1\nenv: {'A=B': 4}",
    'env: {WANDB_NAME: "a\\0b"}',
    "rate: 1\nextra: &x {b: *x}",
    "rate: 1\n~: 4",
    "mode: a\n<<: {rate: 1, stepz: 3}",
    "mode: a\nname: 2020-13-45",
    "mode: a\nsteps: " + "1" * 5000,
]

COMMAND_LINES = [
    ["--step", "3"],
    ["--mod", "3"],
    ["--warmup_ratio=0.1"],
    ["--rate", "high"],
    ["--kind", "c"],
    ["fast"],
    ["--rate"],
    ["--config"],
    ["--config", "a", "--config", "b"],
]


# the recipe's command line


def _recipe(folder: Path, **given):
    code, said = robust_dpo(folder, model(folder, weights="lora_target_modules" in given), **given)
    kept = "error: " + said.partition("error: ")[2]
    raise Ended(f"exit code {code}: {kept.strip()}")


def _recipe_settings(given: dict, folder: Path):
    leaves_nothing(partial(_recipe, **given))(folder)


def _dry_run_too(given: dict, folder: Path):
    leaves_nothing(alike(partial(_recipe, **given), partial(_recipe, **given, dry_run="true")))(folder)


def _recipe_file(text: str, folder: Path):
    (folder / "bad.yaml").write_text(text)
    _recipe_settings(dict(config="bad.yaml"), folder)


def _recipe_data(text: str, folder: Path):
    (folder / "bad.jsonl").write_text(text)
    _recipe_settings(dict(dataset_name="bad.jsonl"), folder)


def _recipe_folder(folder: Path):
    (folder / "empty").mkdir()
    _recipe_settings(dict(dataset_name="empty"), folder)


# one of each place that refuses, which a dry run asks too: config, parser, adapter, folder, model, optimiser
DRY_RUN_TOO = [
    dict(flip_rate=0.5),
    dict(learning_rate="fast"),
    dict(lora_target_modules="q_projj"),
    dict(output_dir="pairs.jsonl/run"),
    dict(model_name_or_path="./no-such-model"),
    dict(lr_scheduler_type="warmup_stable_decay"),
]

DRY_RUN_TOO += [
    dict(adapter="gift_sw", **given)
    for given in (
        dict(gift_bits=1),
        dict(lora_r=64),
        dict(gift_noise="gaussian", gradient_checkpointing_kwargs='{"preserve_rng_state": false}'),
        dict(gift_noise="gaussian", torch_compile="true"),
    )
]

DRY_RUN_TOO += [
    dict(refactor_every=2, adapter="gift_sw"),
    dict(refactor_every=2, use_peft="false"),
    dict(refactor_every=2, optim="adagrad"),
    dict(refactor_every=2, optim="pytorch_optimizer:ademamix"),
    dict(refactor_every=2, optim="sgd", optim_args="momentum=0.9", weight_decay=0.1),
    dict(refactor_every=2, load_in_4bit="true"),
    dict(sam_rho=0.1, adapter="none", use_peft="false", dtype="bfloat16"),
    dict(adapter="allora", allora_eta=0),
    dict(adapter="allora", allora_form="update", weight_decay=0.1),
    dict(adapter="allora", lora_target_modules="embed_tokens"),
]

RECIPE_SETTINGS = [
    dict(adapter="allora", lora_alpha=32),
    dict(adapter="allora", use_peft="false"),
    dict(adapter="allora", lora_dropout=0.1),
    dict(adapter="allora", use_rslora="true"),
    dict(allora_eta=1.0),
    dict(adapter="giftsw"),
    dict(adapter="none"),
    dict(adapter="gift_sw", load_in_4bit="true"),
    dict(adapter="gift_sw", lora_alpha=32),
    dict(gift_bits=3),
    dict(learning_rat=0.1),
    dict(warmup_ratio=0.1),
    dict(max_train_rows=0),
    dict(report_to="wandbb"),
    dict(attn_implementation="spda"),
    dict(dtype="bfloat"),
    dict(lora_r=0),
    dict(resume_from_checkpoint="nope"),
    dict(resume_from_checkpoint="true"),
    dict(model_name_or_path="pairs.jsonl"),
    dict(dataset_name=""),
    dict(dataloader_num_workers=-1),
    dict(attention_cost_factor=0.0),
    dict(packed_width_multiple=0),
    dict(adam_beta1=1.5),
    dict(lora_task_type="CAUSALLM"),
    dict(output_dir=""),
    dict(optim="adamw_torchh"),
    dict(output_dir="x" * 300),
    dict(lora_alpha=-3),
    dict(beta="inf"),
    dict(logging_steps="nan"),
    dict(warmup_steps="nan"),
    dict(eval_steps="inf", eval_strategy="steps"),
    dict(optim_args="foo"),
    dict(lr_scheduler_kwargs='{"foo": 1}'),
    dict(lr_scheduler_type="cosine_with_min_lr"),
    dict(config="none.yaml"),
    dict(model_name_or_path="org/gone"),
    dict(dataset_name="org/gone"),
    dict(dataset_name="gone.jsonl"),
    dict(optim="galore_adamw"),
    dict(optim="lomo"),
    dict(optim="stable_adamw"),
]

RECIPE_FILES = [
    "extra: 1\nseed: &x [*x]\n",
    "seed: 1\n~: 4\n",
    'env: {WANDB_NAME: "a\\0b"}\n',
    "seed: " + "1" * 5000,
]

RECIPE_DATA = {
    "identical sides": lines(row | {"rejected": row["chosen"]} for row in PAIRS),
    "empty sides": lines(row | {"chosen": " "} for row in PAIRS),
    "no column of rejected sides": lines({"prompt": "q", "chosen": "a"} for _ in range(4)),
    "a side is null": lines([PAIRS[0], PAIRS[1] | {"rejected": None}]),
    "a prompt is null": lines([PAIRS[0], PAIRS[1] | {"prompt": None}]),
    "a side is a number": lines([PAIRS[0], PAIRS[1] | {"chosen": 5}]),
    "sides are numbers": lines(row | {"chosen": 5} for row in PAIRS),
    "flip rates are too high": lines(row | {"flip_rate": 0.7} for row in PAIRS),
    "a line is broken": lines(PAIRS[:2]) + '{"prompt": "q",\n',
    "prompts are too long": lines(row | {"prompt": "p" * 200} for row in PAIRS),
    "half a surrogate pair": lines([PAIRS[0], PAIRS[1] | {"chosen": "\ud83d"}]),
    "no rows": "",
}


# preference pairs


def _dpo(folder: Path, rows=None, at=None, adapter=None, **fields):
    args = RobustDPOConfig(**training.settings(folder / "run", **dict(pair_loss="dpo") | fields))
    rows = make_pairs(4) if rows is None else rows
    RobustDPOTrainer(at or model(folder), args=args, train_dataset=rows, peft_config=adapter or training.lora())


def _pg(
    folder: Path,
    rows,
    at=None,
    reward=rollouts.success,
    trainer_class=PolicyGradientTrainer,
    config_class=PolicyGradientConfig,
    **fields,
):
    args = config_class(**rollouts.settings(folder / "run", **fields))
    trainer_class(at or model(folder), reward, args, rows, peft_config=training.lora())


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


ASKED, SAID, OTHER = turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")
UNANSWERED = {
    "rejected is the prompt alone": ([ASKED, SAID], [ASKED]),
    "chosen is the prompt alone": ([ASKED], [ASKED, SAID]),
    "rejected ends with a question": ([ASKED, SAID, ASKED, OTHER], [ASKED, SAID, ASKED]),
    "rejected is a system message and the prompt": ([turn("system", "s"), ASKED, SAID], [turn("system", "s"), ASKED]),
    "rejected is a system message": ([turn("system", "s"), ASKED, SAID], [turn("system", "s")]),
    "both sides are the prompt": ([ASKED], [ASKED]),
}


def _unanswered(chosen, rejected, folder: Path):
    good = {"chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}
    _dpo(folder, Dataset.from_list([good, good, {"chosen": chosen, "rejected": rejected}]))


RATES = [["0.2", "0.1"], [Decimal("0.2"), Decimal("0.1")], [0.1, None], [0.1, 0.7], [0.1, math.nan]]


def _rates(rates: list, folder: Path):
    _dpo(folder, make_pairs(2, flip_rate=rates), pair_loss="rdpo", flip_rate=0.1)


def _splits(folder: Path):
    splits = DatasetDict(train=make_pairs(4), test=make_pairs(4))
    alike(partial(_dpo, rows=splits), partial(_pg, rows=splits))(folder)


def _blocked(folder: Path):
    (folder / "file").write_text("")
    _dpo(folder / "file", at=model(folder))


def _adapter(fields: dict, folder: Path, **settings):
    weights = fields.get("target_modules") == ["q_projj"]
    _dpo(folder, at=model(folder, weights=weights), adapter=LoraConfig(**fields), **settings)


def _none(folder: Path):
    RobustDPOTrainer(None, args=RobustDPOConfig(str(folder / "run")), train_dataset=make_pairs(4))


PREFERENCE = {
    "attention spda": partial(_dpo, model_init_kwargs={"attn_implementation": "spda"}),
    "attention flash": partial(_dpo, model_init_kwargs={"attn_implementation": "flash"}),
    "dtype bfloat": partial(_dpo, model_init_kwargs={"dtype": "bfloat"}),
    "model None": _none,
    "no full batch of pairs": partial(_dpo, per_device_train_batch_size=32, dataloader_drop_last=True),
    "several splits": _splits,
    "a model that is nowhere": partial(_dpo, at="org/gone"),
    "a folder that is missing": partial(_dpo, at="./no-such-model"),
    **{title: partial(_unanswered, *sides) for title, sides in UNANSWERED.items()},
    **{f"flip rates {rates!r}": partial(_rates, rates) for rates in RATES},
    "an output folder below a file": _blocked,
    **{
        f"adapter {fields!r}": leaves_nothing(partial(_adapter, fields))
        for fields in (
            dict(target_modules=["lm_head"]),
            dict(target_modules=["q_projj"]),
            dict(target_modules=["q_proj"], lora_dropout=1.5),
        )
    },
    **{
        f"refactor_every, adapter {fields!r}": leaves_nothing(partial(_adapter, fields, refactor_every=2))
        for fields in (dict(use_dora=True), dict(target_parameters=["experts.gate_up_proj"]))
    },
}


# scored answers


eight = functools.cache(partial(make_scored, 8))


def _a_lol(change, fields: dict, folder: Path):
    scored.build(model(folder), folder / "run", change(eight()), **fields)


def rewarded(rows: Dataset, rewards) -> Dataset:
    return rows.remove_columns("reward").add_column("reward", list(rewards))


def changed(number: int, value: float | None):
    """Change the reward of one row."""

    def change(rows):
        rewards = rows["reward"][:]
        rewards[number] = value
        return rewarded(rows, rewards)

    return change


def even(n: int, reward: float) -> Dataset:
    return rewarded(make_scored(n), [reward] * n)


def same(rows):
    return rows


def far(n: int) -> Dataset:
    rows = make_scored(n, seed=1)
    return rewarded(rows, [50 + 50 * reward for reward in rows["reward"]])


A_LOL_DATA = {
    "no rewards": (lambda rows: rows.remove_columns("reward"), {}),
    "a reward is null": (changed(1, None), {}),
    "a reward is nan": (changed(1, math.nan), {}),
    "a reward is 1.5": (changed(1, 1.5), dict(value="head")),
    "a reward is -0.5": (changed(1, -0.5), dict(variant="wbc")),
    "values of 1": (lambda rows: make_scored(4, baseline=[1.0] * 4), dict(value="column")),
    "rewards of 0.1": (lambda rows: even(6, 0.1), {}),
    "single answers": (same, dict(value="per_prompt")),
    "no column of values": (same, dict(value="column")),
    "8 prompts": (same, dict(value="head", value_folds=9)),
    "a stream to draw from": (lambda rows: rows.to_iterable_dataset(), dict(advantage_weighting="sample")),
    "a stream": (lambda rows: rows.to_iterable_dataset(), {}),
    "prompts are too long": (same, dict(max_length=10)),
    "rewards of 0, others too long": (lambda rows: beyond(4, 1.0, even(20, 0.0)), dict(max_length=100)),
    "rewards of 0, wbc, others too long": (
        lambda rows: beyond(4, 1.0, even(20, 0.0)),
        dict(max_length=100, variant="wbc"),
    ),
    "rewards of 0.1 for a head": (lambda rows: even(6, 0.1), dict(value="head", value_folds=2)),
    "a reward is 1e39": (changed(1, 1e39), {}),
    "a value is 1e39": (lambda rows: make_scored(8, v=[0.0] * 7 + [1e39]), dict(value="column", value_column="v")),
    "rewards of 1e-30": (lambda rows: rewarded(rows, [reward * 1e-30 for reward in rows["reward"]]), {}),
    "rewards equal up to rounding": (
        lambda rows: rewarded(rows, [0.1, 0.1 + 1e-16] * 4),
        {},
    ),
    "values are the rewards": (same, dict(value="column", value_column="reward")),
    "values are prompts": (same, dict(value="column", value_column="prompt")),
    "no full batch": (
        lambda rows: changed(1, 9.0)(make_scored(3)),
        dict(per_device_train_batch_size=32, dataloader_drop_last=True),
    ),
    "another scale": (same, dict(eval_dataset={"held out": far(40)})),
    "a list": (list, {}),
    "several splits": (lambda rows: DatasetDict(train=rows, test=rows), {}),
    "rewards of 0, wbc": (lambda rows: even(4, 0.0), dict(variant="wbc")),
    "generations without a reward function": (
        same,
        dict(value="head", value_folds=2, value_targets="generations", variant="a_lol_ref_free"),
    ),
}


def _given(folder: Path, **given):
    args = ALoLConfig(**scored.settings(folder / "run"))
    ALoLTrainer(model(folder), **dict(args=args, train_dataset=make_scored(4)) | given)


def _heads_below_a_file(folder: Path):
    (folder / "file").write_text("")
    fields = dict(value="head", value_folds=2, variant="a_lol_ref_free")
    scored.build(model(folder), folder / "run", make_scored(4), value_head_dir=str(folder / "file" / "heads"), **fields)


A_LOL_GIVEN = {
    "formatting_func": partial(_given, formatting_func=str),
    "virtual tokens": partial(_given, peft_config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    "no rows": partial(_given, train_dataset=None),
    "value_head_dir below a file": _heads_below_a_file,
}


# ids and positions that a model lacks


def longer(folder: Path) -> str:
    """Give a model whose tokenizer has two tokens more than the embedding has rows."""
    return model(folder, special=("<note>", "</note>"))


def noted(rows: Dataset, column: str, row: int = 3) -> Dataset:
    """Put the first of them at the end of a row's column."""
    rows = rows.to_list()
    if isinstance(rows[row][column], str):
        rows[row][column] += "<note>"
    else:
        rows[row][column][-1]["content"] += "<note>"
    return Dataset.from_list(rows)


def _told(describe, config, settings, rows, more=(), at=longer, **fields):
    """Describe the run that is refused."""
    return lambda folder: describe(at(folder), config(**settings(folder / "run", **fields)), *more, rows)


def _pairs_noted(column: str, folder: Path):
    rows = noted(make_pairs(8), column)
    trainer = partial(_dpo, rows=rows, at=longer(folder))
    told = _told(preferences.describe, RobustDPOConfig, training.settings, rows)
    (alike(trainer, told) if column == "chosen" else trainer)(folder)


def _answers_noted(folder: Path):
    rows = noted(make_scored(8), "completion")
    more = [scored_answers.ScoredArguments(dataset_name="a")]
    alike(
        lambda folder: scored.build(longer(folder), folder / "run", rows),
        _told(scored_answers.describe, ALoLConfig, scored.settings, rows, more),
    )(folder)


TASKS = [tasks.TaskArguments(dataset_name="a")]


def _tasks_noted(folder: Path):
    rows = noted(rollouts.prompts([1] * 8), "prompt")
    trainer = partial(_pg, rows=rows, at=longer(folder))
    alike(trainer, _told(tasks.describe, PolicyGradientConfig, rollouts.settings, rows, TASKS))(folder)


def _demonstrations_noted(folder: Path):
    rows = noted(rollouts.prompts([1] * 8), "demonstration")
    trainer, config = rollouts.PRESETS["hpt"]
    _pg(folder, rows, at=longer(folder), trainer_class=trainer, config_class=config)


def _other_tokenizer(folder: Path):
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 257], "rejected_ids": [4, 257]} for _ in range(8)]
    rows[3]["rejected_ids"] = [1000, 257]
    _dpo(folder, Dataset.from_list(rows))


TABLES = {
    "gpt2": dict(max_position_embeddings=64),
    "opt": dict(max_position_embeddings=64, word_embed_proj_dim=64, dropout=0.0),
    "gpt_neo": dict(max_position_embeddings=64, attention_types=[[["global"], 2]], num_layers=2),
}


def long_pairs(words: int = 40) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [ASKED],
                "chosen": [turn("assistant", f"{i} " * words)],
                "rejected": [turn("assistant", "no")],
            }
            for i in range(8)
        ]
    )


def _long_pairs(at, folder: Path):
    _dpo(folder, long_pairs(), at=at(folder), max_length=None)


def _long_pairs_described(at, folder: Path):
    _told(preferences.describe, RobustDPOConfig, training.settings, long_pairs(), at=at, max_length=200)(folder)


def _long_answers(at, folder: Path):
    scored.build(at(folder), folder / "run", make_scored(8, length=80), max_length=None)


def _long_rollouts(at, folder: Path):
    rows, fields = rollouts.prompts([1] * 8), dict(max_completion_length=60)
    trainer = partial(_pg, rows=rows, at=at(folder), **fields)
    told = _told(tasks.describe, PolicyGradientConfig, rollouts.settings, rows, TASKS, at=at, **fields)
    alike(trainer, told)(folder)


def _long_prompts(at, folder: Path):
    _pg(folder, Dataset.from_list([{"prompt": "1 " + "p" * 80}] * 8), at=at(folder))


TOO_LONG = {
    "long rollouts": _long_rollouts,
    "long prompts": _long_prompts,
    "long pairs": _long_pairs,
    "long pairs in a dry run": _long_pairs_described,
    "long answers": _long_answers,
}
# the others are tried with these models in `tests/trainers/test_limits.py`
OF_EVERY_TABLE = ("long rollouts", "long prompts")

LIMITS = {
    **{f"a token in a pair's {column}": partial(_pairs_noted, column) for column in ("prompt", "chosen", "rejected")},
    "a token in a scored answer": _answers_noted,
    "a token in a task's prompt": _tasks_noted,
    "a token in a task's demonstration": _demonstrations_noted,
    "ids of another tokenizer": _other_tokenizer,
    **{
        f"{name}, {what}": partial(TOO_LONG[what], partial(model, architecture=name, **settings))
        for name, settings in TABLES.items()
        for what in TOO_LONG
        if name == "gpt2" or what in OF_EVERY_TABLE
    },
}


# federated training


def _rounds(fields: dict, folder: Path):
    FederatedConfig(**dict(num_clients=6) | fields)


def _split(rows, fields: dict, folder: Path):
    partitions.split(rows, FederatedConfig(**dict(num_clients=2) | fields))


def _loop(given: dict, folder: Path):
    synthetic.loop_of(**given).run()


def _reply(reply, folder: Path):
    federated.check(federated.good("a"), reply, on_bad_reply="abort")


def _flower(build, folder: Path):
    build()


def _shown(given) -> str:
    return repr(given) if len(repr(given)) < 200 else repr(given)[:80] + "..."


def _listed(name: str, build, values) -> list[Case]:
    return [Case(f"{name}: {_shown(given)}", partial(build, given)) for given in values]


def _named(name: str, builds: dict) -> list[Case]:
    return [Case(f"{name}: {title}", build) for title, build in builds.items()]


# by the parts of `messages.txt`
CASES = {
    "settings": [
        *(case for name, method in METHODS.items() for case in _listed(name, partial(_config, name), method.refused)),
        *_listed("config file", _file, FILES),
        *_listed("command line", _command_line, COMMAND_LINES),
    ],
    "recipe": [
        *_listed("recipe", _dry_run_too, DRY_RUN_TOO),
        *_listed("recipe", _recipe_settings, RECIPE_SETTINGS),
        *_listed("recipe's file", _recipe_file, RECIPE_FILES),
        *_named("recipe's data", {title: partial(_recipe_data, text) for title, text in RECIPE_DATA.items()}),
        Case("recipe's data: a folder without data", _recipe_folder),
    ],
    "preference pairs": _named("robust_dpo", PREFERENCE),
    "scored answers": [
        *_named("a_lol", {title: partial(_a_lol, *given) for title, given in A_LOL_DATA.items()}),
        *_named("a_lol is given", A_LOL_GIVEN),
    ],
    "limits": _named("limits", LIMITS),
    "federated": [
        *_listed("rounds", _rounds, federated.REFUSED),
        *_listed("rounds", _rounds, [given for given, _ in (*federated.EXCLUDED, *federated.NEEDED)]),
        *_named("clients", {title: partial(_split, *given[:2]) for title, given in federated.SPLITS.items()}),
        *_named("loop", {title: partial(_loop, given) for title, (given, _) in federated.LOOPS.items()}),
        *_named("reply", {title: partial(_reply, reply) for title, (reply, _) in federated.BAD_REPLIES.items()}),
        *_named("flower", {title: partial(_flower, build) for title, (build, _) in federated.FLOWER.items()}),
    ],
}
