"""What the recipe with scored answers adds to every recipe's own: its data settings, its rows, its dry run."""

from dataclasses import dataclass, field

from posttrain import recipe
from posttrain.config import DataArguments
from posttrain.private import without_secrets
from posttrain.recipe import dry_run


@dataclass
class ScoredArguments(DataArguments):
    """Settings of where scored answers come from: rows of prompt, completion and reward, or pairs with rewards."""

    same_scale: bool = field(
        default=False, metadata={"help": "The rewards of several data sets are on one scale, whatever it looks like."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Your column's name. Default: prompt."})
    completion_column: str | None = field(default=None, metadata={"help": "Your column's name. Default: completion."})
    reward_column: str | None = field(default=None, metadata={"help": "Your column's name. Default: reward."})
    reward_func: str | None = field(
        default=None,
        metadata={
            "help": "Scores every answer once, before training, instead of a column: maths_answer, exact_match, "
            "format, length, or my_module:my_function."
        },
    )

    @property
    def columns(self) -> dict[str, str]:
        """Map your columns to ours, as `load_scored` takes them."""
        named = {"prompt": self.prompt_column, "completion": self.completion_column, "reward": self.reward_column}
        return {yours: ours for ours, yours in named.items() if yours is not None and yours != ours}


def load_answers(data_args: ScoredArguments, training_args, answers_class=None):
    """Load the scored answers to train on, and those for evaluation if named or asked for by `eval_strategy`.

    `answers_class`: the trainer's; A-LoL's by default.
    """
    from posttrain.data.scored.loading import load_scored
    from posttrain.data.scored.scales import check_scales
    from posttrain.trainers.offline.a_lol_answers import ALoLAnswers

    needs_reward = training_args.weighs_by is not None and data_args.reward_func is None
    keep, rewards = tuple((answers_class or ALoLAnswers)(training_args).kept_columns()), {}

    def load(source, split, limit, convert=True, **given):
        found = load_scored(
            source, split, limit, data_args.columns, data_args.same_scale,
            needs_reward=needs_reward, keep=keep, convert=convert, **given,
        )  # fmt: skip
        if needs_reward:
            part = "training" if len(rewards) < len(data_args.sources) else "evaluation"
            name = ", ".join([source, *(f"{key} {value}" for key, value in given.items())])
            name = f"{name} ({part})"
            rewards[f"{name}, {len(rewards)}" if name in rewards else name] = found["reward"][:]
        return found

    datasets = recipe.load_splits(load, data_args, training_args.eval_strategy != "no", training_args.seed)
    if not data_args.same_scale:
        check_scales(rewards, "data sets")
    return datasets


def describe(
    model_id: str,
    args,
    data_args: ScoredArguments,
    train_dataset,
    peft_config=None,
    eval_dataset=None,
    answers_class=None,
) -> dict:
    """Describe a run: answers, steps, parameters and checkpoint size, statistics of the rewards, the first answer.

    Settings and data are checked as the trainer would. The tokenizer is loaded, every answer is tokenised, and the
    model is built without memory for its weights. Answers that fit `max_length` are weighed; those that will have no
    gradient are counted where their values are known without the model. `answers_class`: the trainer's; A-LoL's by
    default.

    Raises:
        ConfigError, DataError, EnvironmentIssue: what the trainer would refuse before the model's weights load, and
            adapter settings that do not fit the model.
    """
    from posttrain import tables
    from posttrain.data.instructions.tokens import tokenised_before_loading
    from posttrain.data.processing import processing_class_for
    from posttrain.data.scored import baselines, scoring
    from posttrain.run.prepared import check_fills_a_batch, micro_batches, steps
    from posttrain.trainers.offline import prompt_values
    from posttrain.trainers.offline.a_lol_answers import ALoLAnswers

    config, name = dry_run.check(model_id, args, peft_config), "train_dataset"
    processing_class = processing_class_for(model_id, None, args)
    answers = (answers_class or ALoLAnswers)(args, data_args.reward_func)
    if data_args.reward_func is not None and args.allow_code is None:
        # one that is none is refused here; what it gives is known once it has scored the answers
        scoring.check_reward(data_args.reward_func)
    if answers.has_head:
        prompt_values.check_heads_can_be_kept(args, data_args.reward_func)
    ready = answers.prepare(
        model_id, config, processing_class, train_dataset, eval_dataset, data_args.same_scale,
        score=data_args.reward_func is None,
    )  # fmt: skip
    facts, rows, with_gradient = {}, ready.train_dataset, None
    if answers.has_head and data_args.reward_func is not None:
        answers.check_value_prompts(len(set(baselines.prompt_keys(rows))), name)
    elif answers.weighed_late and not answers.has_head and data_args.reward_func is None:
        # of tokens that come with the model: as far as the values alone tell
        rows = answers.weigh(rows, name)
        rows = rows.select([i for i, weight in enumerate(rows["weight"][:]) if weight != 0])
    kept, within = len(rows), ready.facts.get("within_max_length")
    first = (rows if kept else ready.train_dataset).select([0])
    if within is None:
        given = len(ready.train_dataset)
        within = f"at most {given}: chat_template_path or eos_token change the tokens once the model is loaded"
    for part in ("rewards", "advantages"):
        if part in ready.facts:
            facts[part] = "\n" + tables.histogram(ready.facts[part])
    if answers.has_head:
        with_gradient = "known once the value head has learned"
    elif answers.needs_rewards and data_args.reward_func is not None:
        with_gradient = f"known once {without_secrets(data_args.reward_func)} has scored the answers"
    elif not tokenised_before_loading(args):
        with_gradient = f"at most {kept}"
    else:
        check_fills_a_batch(args, kept)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    taken = steps(args, micro_batches(args, kept))
    return {
        "processes": args.world_size,
        "scored answers": ready.facts["answers"],
        "of them within max_length": within,
        "of them with a gradient": kept if with_gradient is None else with_gradient,
        "answers per step": batch,
        "steps": f"at most {taken}" if with_gradient is not None and args.max_steps <= 0 else taken,
        **dry_run.sizes(config, args, peft_config),
        **facts,
        **_as_learned(first, processing_class, args, name),
        "reward": f"by {without_secrets(data_args.reward_func)}" if data_args.reward_func else first[0].get("reward"),
    }


def _as_learned(row, processing_class, args, name: str) -> dict[str, str]:
    """Render the prompt and the answer of a one-row data set from their tokens, as far as `max_length` leaves them."""
    from posttrain.data.instructions.tokens import learned_ends
    from posttrain.data.processing import tokenizer_of
    from posttrain.data.scored import answer_tokens
    from posttrain.trainers.sft.prepare import kept_part

    if "input_ids" not in row.column_names:
        answer_tokens.check_template(row, processing_class)
        row = answer_tokens.tokenise(row, processing_class, args, name)
    part, tokenizer = kept_part(args), tokenizer_of(processing_class)
    ids, labels = row[0]["input_ids"][part], row[0]["labels"][part]
    start, _ = learned_ends(labels)
    return {"prompt": tokenizer.decode(ids[:start]), "completion": tokenizer.decode(ids[start:])}
