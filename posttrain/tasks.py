"""What the recipes with verifiable rewards share: tasks, rewards, trainer, report, hub."""

import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.config import DataArguments, ModelArguments, get_peft_config, get_quantization_config, parse
from posttrain.errors import ConfigError, DataError

SAMPLE_ROWS = 64


@dataclass
class TaskArguments(DataArguments):
    """Where tasks come from, and what scores the answers to them."""

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
        metadata={"help": "Column with the demonstration. Where nothing learns from it, the gold answer's will do."},
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
        if not self.reward_funcs:
            self.reward_funcs = ["gym"] if (self.dataset_name or "").startswith("gym:") else ["maths_answer"]

    @property
    def columns(self) -> dict[str, str] | None:
        """The columns as `load_demonstrations` takes them; None where they are to be found by their known names."""
        named = {"prompt": self.prompt_column, "demonstration": self.demonstration_column, "gold": self.gold_column}
        if not any(named.values()):
            return None
        return {"prompt": "prompt", "demonstration": "demonstration"} | {k: v for k, v in named.items() if v}

    @property
    def is_local(self) -> bool:
        """Whether the data set's name means something on this machine only."""
        return self.dataset_name.split(":")[0] in ("generated", "gym") or Path(self.dataset_name).exists()


def load_tasks(task_args: TaskArguments, evaluate: bool):
    """The training tasks, and those for evaluation if some are named or `evaluate` asks for them."""
    from posttrain.data.demonstrations import load_demonstrations

    def load(name, split, limit):
        return load_demonstrations(
            name,
            split,
            limit,
            columns=task_args.columns,
            config=task_args.dataset_config,
            conversational=task_args.conversational,
        )

    train_dataset = load(task_args.dataset_name, task_args.dataset_train_split, task_args.max_train_rows)
    eval_name = task_args.eval_dataset_name
    if eval_name is None:
        if not evaluate:
            return train_dataset, None
        if Path(task_args.dataset_name).is_file():
            raise ConfigError(
                f"eval_strategy asks for evaluation, but the file {task_args.dataset_name} has no splits. "
                'Set eval_dataset_name to another file, or eval_strategy: "no".'
            )
        eval_name = task_args.dataset_name
    return train_dataset, load(eval_name, task_args.dataset_test_split, task_args.max_eval_rows)


def check_tasks(args, rewards: list, train_dataset, eval_dataset) -> None:
    """What can be told before a model loads: enough tasks, gold answers that can be scored against, known names.

    Raises ConfigError or DataError. Rewards with workers start them.
    """
    from posttrain.rewards import check_golds

    prompts = args.generation_batch_size // args.num_generations
    if len(train_dataset) < prompts:
        raise DataError(
            f"train_dataset has {len(train_dataset)} tasks, and a generation takes {prompts} prompts "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}). Give more "
            "tasks, or make per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation smaller."
        )
    names = [reward.__name__ for reward in rewards]
    if args.success_reward is not None and args.success_reward not in names:
        raise ConfigError(f"success_reward is {args.success_reward!r}; it must be one of {', '.join(names)}.")
    for reward in rewards:
        column = getattr(reward, "gold", None)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if column and dataset is not None:
                check_golds(dataset, column, reward, name)


def run(trainer_class, config_class) -> None:
    """The whole of a recipe: settings, tasks, rewards, training, evaluation, card, hub."""
    from posttrain.models import resolve_model
    from posttrain.reporting import RunReport
    from posttrain.rewards import get_rewards

    task_args, model_args, training_args = parse((TaskArguments, ModelArguments, config_class))
    for name, arguments in (("model_name_or_path", model_args), ("dataset_name", task_args)):
        if not getattr(arguments, name):
            raise ConfigError(f"{name} is not set; give it in the config file or as --{name} VALUE.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(training_args.model_init_kwargs or {}),
    }
    rewards = get_rewards(task_args.reward_funcs)
    try:
        train_dataset, eval_dataset = load_tasks(task_args, evaluate=training_args.eval_strategy != "no")
        check_tasks(training_args, rewards, train_dataset, eval_dataset)
        model, peft_config = resolve_model(model_args.model_name_or_path), get_peft_config(model_args)
        if training_args.dry_run:
            facts = describe(model, training_args, task_args, train_dataset, peft_config)
            return show(facts)
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
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        if eval_dataset is not None:
            metrics = trainer.evaluate()
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics)
    finally:
        for reward in rewards:
            reward.close()

    # Every rank saves: under ZeRO-3 each one holds a part of the weights.
    trainer.save_model()
    hub_dataset = None if task_args.is_local else task_args.dataset_name
    trainer.create_model_card(dataset_name=hub_dataset)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=hub_dataset)
    trainer.end()


def describe(model_id: str, args, task_args: TaskArguments, train_dataset, peft_config=None) -> dict:
    """Rollouts, steps, parameters, tokens and checkpoint size of a run, and its first task as the model sees it.

    Settings and data are checked as the trainer would. The tokenizer is loaded, and the model is built without memory
    for its weights.

    Raises:
        ConfigError, DataError, EnvironmentIssue: what the trainer would refuse before the model's weights load, and
            adapter settings that do not fit the model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from posttrain.trainers import _checks, _demonstrations

    _checks.check_args(args, type(args))
    _checks.check_output_dir(args.output_dir)
    if peft_config is not None:
        _checks.check_lora(peft_config)
    config = _checks.load_config(model_id, args)
    tokenizer = _checks.tokenizer_for(model_id, None, args)
    if args.learns_from_demonstrations:
        train_dataset = _demonstrations.tokenise(train_dataset, tokenizer, args, "train_dataset")

    sample = train_dataset.select(range(min(SAMPLE_ROWS, len(train_dataset))))
    texts = [_rendered(row["prompt"], tokenizer, args) for row in sample]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    with init_empty_weights(include_buffers=False), warnings.catch_warnings(), _checks.upstream_refusals():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        # without memory for the weights, shared ones come out apart
        model.tie_weights()
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    rollouts = args.generation_batch_size
    prompts = rollouts // args.num_generations
    # what is left of an epoch after its whole generations is not trained on
    micro_batches = len(train_dataset) // prompts * args.steps_per_generation * args.num_iterations
    steps_an_epoch = max(math.ceil(micro_batches / args.gradient_accumulation_steps), 1)
    facts = {
        "processes": args.world_size,
        "training tasks": len(train_dataset),
        "prompts per generation": prompts,
        "rollouts per generation": rollouts,
        "rollouts per step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": args.max_steps if args.max_steps > 0 else math.ceil(steps_an_epoch * args.num_train_epochs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable parameters": trainable,
        "longest prompt in the sample (tokens)": max(lengths),
        "tokens of a rollout, at most": args.max_completion_length,
        # fp32; AdamW keeps two numbers a parameter beside the weights
        "checkpoint bytes (estimate)": 4 * trainable * (1 if args.save_only_model else 3),
    }
    if args.learns_from_demonstrations:
        facts["longest demonstration (tokens)"] = max(len(ids) for ids in train_dataset[_demonstrations.IDS])
    facts |= {"rewards": ", ".join(task_args.reward_funcs), "prompt": texts[0]}
    if args.learns_from_demonstrations:
        facts["demonstration"] = tokenizer.decode(train_dataset[0][_demonstrations.IDS])
    return facts | {"gold": train_dataset[0].get("gold")}


def _rendered(prompt, tokenizer, args) -> str:
    if isinstance(prompt, str):
        return prompt
    try:
        return tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False, **(args.chat_template_kwargs or {})
        )
    except ValueError as error:
        raise ConfigError(
            f"prompts are messages, and the model's tokenizer has no chat template ({error}). Set `conversational: "
            "false` for tasks as plain text, or name a model that has one."
        ) from None


def show(facts: dict) -> None:
    """Print what `describe` found, from the first process alone."""
    if os.environ.get("RANK", "0") != "0":
        return
    print("A dry run: nothing was trained and nothing was written.\n")
    for name, value in facts.items():
        if name in ("prompt", "demonstration", "gold"):
            print(f"\nFirst {'task, its prompt' if name == 'prompt' else name}:\n{value}")
        else:
            print(f"{name:42} {value if isinstance(value, str) else format(value, ',')}")
