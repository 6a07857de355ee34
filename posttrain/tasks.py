"""What the recipes with verifiable rewards share: tasks, rewards, trainer, report, hub."""

from dataclasses import dataclass, field
from pathlib import Path

from posttrain.config import DataArguments, ModelArguments, get_peft_config, get_quantization_config, parse
from posttrain.errors import ConfigError


@dataclass
class TaskArguments(DataArguments):
    """Where tasks come from, and what scores the answers to them."""

    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards, summed: maths_answer, exact_match, format, length, gym, or my_module:my_function; "
            "settings follow a name as `length?max_length=512&cache=128`."
        },
    )
    gold_column: str = field(default="gold", metadata={"help": "Column with the answer that is right."})
    conversational: bool = field(
        default=True, metadata={"help": "Make texts into messages, for models with a chat template."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.reward_funcs:
            self.reward_funcs = ["gym"] if (self.dataset_name or "").startswith("gym:") else ["maths_answer"]


def load_tasks(task_args: TaskArguments, evaluate: bool):
    """The training tasks, and those for evaluation if some are named or `evaluate` asks for them."""
    from posttrain.data.demonstrations import load_demonstrations

    def load(name, split, limit):
        return load_demonstrations(
            name, split, limit, config=task_args.dataset_config, conversational=task_args.conversational
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


def start_rewards(task_args: TaskArguments, *datasets) -> list:
    """The rewards with their workers running, after a look at every gold answer."""
    from posttrain.rewards import check_golds, get_rewards

    rewards = get_rewards(task_args.reward_funcs)
    for reward in rewards:
        column = getattr(reward, "gold", None)
        for name, dataset in zip(("train_dataset", "eval_dataset"), datasets, strict=False):
            if column and dataset is not None and column in dataset.column_names:
                check_golds(dataset, column, reward, name)
    for reward in rewards:
        reward.start()
    return rewards


def run(trainer_class, config_class) -> None:
    """The whole of a recipe: settings, tasks, rewards, training, evaluation, card, hub."""
    from posttrain.models import resolve_model
    from posttrain.reporting import RunReport

    task_args, model_args, training_args = parse((TaskArguments, ModelArguments, config_class))
    for name, arguments in (("model_name_or_path", model_args), ("dataset_name", task_args)):
        if getattr(arguments, name) is None:
            raise ConfigError(f"{name} is not set; give it in the config file or as --{name} VALUE.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(training_args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = load_tasks(task_args, evaluate=training_args.eval_strategy != "no")
    model, peft_config = resolve_model(model_args.model_name_or_path), get_peft_config(model_args)
    if training_args.dry_run:
        return show_plan(training_args, task_args, train_dataset)
    rewards = start_rewards(task_args, train_dataset, eval_dataset)

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

    # Every rank saves: under ZeRO-3 each one holds a part of the weights.
    trainer.save_model()
    local = Path(task_args.dataset_name).exists() or task_args.dataset_name.split(":")[0] in ("generated", "gym")
    hub_dataset = None if local else task_args.dataset_name
    trainer.create_model_card(dataset_name=hub_dataset)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=hub_dataset)
    trainer.end()


def show_plan(args, task_args: TaskArguments, train_dataset) -> None:
    """Print what a run would do: nothing is trained and nothing is written."""
    rollouts = args.generation_batch_size
    prompts = rollouts // args.num_generations
    generations = len(train_dataset) // prompts
    steps = generations * args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    facts = {
        "tasks": len(train_dataset),
        "prompts per generation": prompts,
        "rollouts per generation": rollouts,
        "optimiser steps": args.max_steps if args.max_steps > 0 else int(steps * args.num_train_epochs),
        "tokens of a rollout, at most": args.max_completion_length,
    }
    print("A dry run: nothing was trained and nothing was written.\n")
    for name, value in facts.items():
        print(f"{name:42} {value:,}")
    print(f"{'rewards':42} {', '.join(task_args.reward_funcs)}")
    print(f"\nFirst task:\n{train_dataset[0]}")
