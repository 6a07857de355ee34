"""Preference training where some labels are wrong: rDPO, Dr. DPO, cDPO and DPO.

    accelerate launch --config_file configs/accelerate/cpu.yaml recipes/robust_dpo.py \
        --config configs/robust_dpo/cpu.yaml --dataset_name pairs.jsonl.gz --flip_rate 0.2

Settings are the fields of DataArguments, ModelArguments and RobustDPOConfig, in the YAML file or on the
command line, which wins. The script ends with exit code 2 for a bad setting, 3 for bad data, 4 for a missing
package or connection; `accelerate launch` itself turns each of them into 1.
"""

import sys
from pathlib import Path

import posttrain.quiet  # noqa: F401  before the libraries, of which some speak while they are imported
from posttrain import RobustDPOConfig, RobustDPOTrainer, dry_run
from posttrain.config import (
    DataArguments,
    ModelArguments,
    get_peft_config,
    get_quantization_config,
    parse,
    run_main,
)
from posttrain.data.preferences import load_preferences
from posttrain.errors import ConfigError
from posttrain.models import resolve_model
from posttrain.reporting import RunReport


def main():
    data_args, model_args, training_args = parse((DataArguments, ModelArguments, RobustDPOConfig))
    for name, arguments in (("model_name_or_path", model_args), ("dataset_name", data_args)):
        if not getattr(arguments, name):
            raise ConfigError(f"{name} is not set; give it in the config file or as --{name} VALUE.")

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(training_args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = load_data(data_args, evaluate=training_args.eval_strategy != "no")
    model, peft_config = resolve_model(model_args.model_name_or_path), get_peft_config(model_args)
    if training_args.dry_run:
        facts = dry_run.describe(model, training_args, train_dataset, peft_config, eval_dataset=eval_dataset)
        return dry_run.show(facts)

    trainer = RobustDPOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        quantization_config=get_quantization_config(model_args),
        callbacks=[RunReport(sections={"data": vars(data_args), "model": vars(model_args)})],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    # Every rank saves: under ZeRO-3 each one holds a part of the weights.
    trainer.save_model()
    hub_dataset = None if is_local(data_args.dataset_name) else data_args.dataset_name
    trainer.create_model_card(dataset_name=hub_dataset)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=hub_dataset)
    trainer.end()


def load_data(data_args: DataArguments, evaluate: bool):
    """The training pairs, and the evaluation pairs if some are named or `evaluate` asks for them."""
    train_dataset = load_preferences(data_args.dataset_name, data_args.dataset_train_split, data_args.max_train_rows)
    eval_name = data_args.eval_dataset_name
    if eval_name is None:
        if not evaluate:
            return train_dataset, None
        if Path(data_args.dataset_name).is_file():
            raise ConfigError(
                f"eval_strategy asks for evaluation, but the file {data_args.dataset_name} has no splits. "
                'Set eval_dataset_name to another file, or eval_strategy: "no".'
            )
        eval_name = data_args.dataset_name
    return train_dataset, load_preferences(eval_name, data_args.dataset_test_split, data_args.max_eval_rows)


def is_local(dataset_name: str) -> bool:
    """Whether the name means something on this machine only."""
    return dataset_name.startswith("generated:") or Path(dataset_name).exists()


if __name__ == "__main__":
    sys.exit(run_main(main))
