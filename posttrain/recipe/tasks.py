"""What the recipes with verifiable rewards share: tasks, rewards, trainer, report, hub."""

from dataclasses import dataclass, field

from posttrain import recipe
from posttrain.config import DataArguments, ModelArguments, get_quantization_config, parse
from posttrain.errors import ConfigError, DataError
from posttrain.private import without_secrets
from posttrain.recipe import dry_run


@dataclass
class TaskArguments(DataArguments):
    """Settings of where tasks come from, and what scores the answers to them."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local .json, .jsonl, .jsonl.gz or .parquet, generated:arithmetic, generated:modular_sum, "
            "or gym:NAME; options follow as `generated:arithmetic?n=256&digits=1-2`."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards, summed: maths_answer, exact_match, format, length, gym, or my_module:my_function; "
            "settings follow a name as `length?max_length=512&cache=128`."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the prompt, in a file or hub set whose names are not known."}
    )
    demonstration_column: str | None = field(
        default=None,
        metadata={"help": "Column with the demonstration; needed only where something learns from it."},
    )
    gold_column: str | None = field(
        default=None,
        metadata={"help": "Column with the answer that is right. Default: what the demonstration marks as its answer."},
    )
    conversational: bool = field(
        default=True, metadata={"help": "Make texts into messages, for models with a chat template."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.datasets is not None and self.dataset_config is not None:
            raise ConfigError(
                f"dataset_config is {self.dataset_config!r} beside datasets; write it as `name` into the entry of the "
                "data set that has it."
            )
        if not self.reward_funcs:
            of_gym = [source.path.startswith("gym:") for source in self.sources]
            self.reward_funcs = ["gym"] if of_gym and all(of_gym) else ["maths_answer"]

    @property
    def columns(self) -> dict[str, str] | None:
        """Map columns as `load_demonstrations` takes them; None where they are found by their known names."""
        named = {"prompt": self.prompt_column, "demonstration": self.demonstration_column, "gold": self.gold_column}
        if not any(named.values()):
            return None
        return {"prompt": "prompt"} | {k: v for k, v in named.items() if v}


def load_tasks(task_args: TaskArguments, training_args):
    """Load the training tasks, and those for evaluation if named or asked for by `eval_strategy`."""
    from posttrain.data.tasks.loading import load_demonstrations

    learns = training_args.learns_from_demonstrations
    columns = task_args.columns
    if learns and columns is not None:
        columns = {"demonstration": "demonstration", **columns}

    def load(source, split, limit, convert=True, **given):
        return load_demonstrations(
            source,
            split,
            limit,
            columns=columns,
            config=task_args.dataset_config,
            conversational=task_args.conversational,
            need_demonstrations=learns and training_args.empty_demonstrations == "error",
            convert=convert,
            **given,
        )

    return recipe.load_splits(load, task_args, training_args.eval_strategy != "no", training_args.seed)


def check_tasks(args, rewards: list, train_dataset, eval_dataset) -> None:
    """Check, before a model loads, that gold answers can be scored against and that names are known.

    Raises ConfigError or DataError. Rewards with workers start them.
    """
    from posttrain.rewards import check_golds
    from posttrain.trainers.policy_gradient import reward_setup

    reward_setup.check(args, reward_setup.numbered(rewards))
    for reward in rewards:
        column = getattr(reward, "gold", None)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if column and dataset is not None:
                check_golds(dataset, column, reward, name)


def run(trainer_class, config_class) -> None:
    """Run a whole recipe: settings, tasks, rewards, training, evaluation, card, hub."""
    from posttrain.rewards import get_rewards
    from posttrain.run.report import RunReport

    task_args, model_args, training_args = parse((TaskArguments, ModelArguments, config_class))
    model, peft_config = recipe.named_model(task_args, model_args, training_args)
    rewards = get_rewards(task_args.reward_funcs, training_args.allow_code)
    try:
        train_dataset, eval_dataset = load_tasks(task_args, training_args)
        check_tasks(training_args, rewards, train_dataset, eval_dataset)
        if training_args.dry_run:
            facts = describe(model, training_args, task_args, train_dataset, peft_config, eval_dataset, rewards)
            return dry_run.show(facts)
        for reward in rewards:
            # the workers of a rank that none of the checks needed
            reward.start()
        trainer = trainer_class(
            model=model,
            reward_funcs=rewards,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            quantization_config=get_quantization_config(model_args),
            callbacks=[RunReport(sections={"tasks": vars(task_args), "model": vars(model_args)})],
        )
        recipe.train(trainer, task_args, evaluate=eval_dataset is not None)
    finally:
        for reward in rewards:
            reward.close()


def describe(
    model_id: str,
    args,
    task_args: TaskArguments,
    train_dataset,
    peft_config=None,
    eval_dataset=None,
    rewards: list | None = None,
) -> dict:
    """Describe a run: rollouts, steps, parameters, tokens, checkpoint size, and its first task as the model sees it.

    Settings and data are checked as the trainer would. The tokenizer is loaded, and the model is built without memory
    for its weights. `rewards`: reward functions; those that `task_args` names by default.

    Raises:
        ConfigError, DataError, EnvironmentIssue: what the trainer would refuse before the model's weights load, and
            adapter settings that do not fit the model.
    """
    from posttrain.data.processing import processing_class_for, tokenizer_of
    from posttrain.data.tasks import tokens
    from posttrain.run.prepared import steps
    from posttrain.trainers.policy_gradient import prepare, reward_setup

    config = dry_run.check(model_id, args, peft_config, prepare.has_live_reference(args))
    processor = processing_class_for(model_id, None, args)
    prepare.advantage_function(args)
    rewards = reward_setup.reward_functions(task_args.reward_funcs if rewards is None else rewards, args)
    reward_setup.check(args, rewards)
    ready = prepare.prepare(model_id, args, config, processor, train_dataset, eval_dataset, rewards=rewards)
    train_dataset = ready.train_dataset
    tokenizer = tokenizer_of(processor)
    sample = train_dataset.select(range(min(dry_run.SAMPLE_ROWS, len(train_dataset))))
    texts = [_rendered(row, tokenizer, args) for row in sample]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    rollouts = args.generation_batch_size
    prompts = rollouts // args.num_generations
    facts = {
        "processes": args.world_size,
        "training tasks": len(train_dataset),
        "prompts per generation": prompts,
        "rollouts per generation": rollouts,
        "rollouts per step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": steps(args, prepare.micro_batches(args, len(train_dataset))),
        "longest prompt in the sample (tokens)": max(lengths),
        "tokens of a rollout, at most": args.max_completion_length,
    } | dry_run.sizes(config, args, peft_config)
    if args.learns_from_demonstrations:
        facts["longest demonstration (tokens)"] = max(len(ids) for ids in train_dataset[tokens.IDS])
    facts |= {"rewards": ", ".join(without_secrets(task_args.reward_funcs)), "prompt": texts[0]}
    if args.learns_from_demonstrations:
        facts["demonstration"] = tokenizer.decode(train_dataset[0][tokens.IDS])
    return facts | {"gold": train_dataset[0].get("gold")}


def _rendered(row, tokenizer, args) -> str:
    from posttrain.data.rendering.refusals import refusal
    from posttrain.data.row_options import template_kwargs_of, tools_of

    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    kwargs = (args.chat_template_kwargs or {}) | template_kwargs_of(row)
    try:
        return tokenizer.apply_chat_template(
            prompt, tools=tools_of(row), add_generation_prompt=True, tokenize=False, **kwargs
        )
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"prompts are messages, and the model's tokenizer has no chat template ({error}). Set `conversational: "
            "false` for tasks as plain text, or name a model that has one."
        ) from None
    # a chat template is a program that came with the model: anything can come out of it
    except Exception as error:
        said = refusal(error, [prompt], lambda messages: tokenizer.apply_chat_template(messages, tokenize=False))
        raise DataError(f"train_dataset, row 1: {said}") from error
