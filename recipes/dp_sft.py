"""Supervised fine-tuning with differential privacy: a LoRA, and a promise about the rows that it was trained on.

    accelerate launch --config_file configs/accelerate/cpu.yaml recipes/dp_sft.py \
        --config configs/dp_sft/cpu.yaml --dataset_name instructions.jsonl.gz --target_epsilon 3

Settings are the fields of DataArguments, ModelArguments and DPSFTConfig, in the YAML file or on the command line, which
wins. The script ends with exit code 2 for a bad setting, 3 for bad data, 4 for a missing package or connection, 5 for a
run that diverged; `accelerate launch` itself turns each of them into 1.
"""

import sys

import posttrain.quiet  # noqa: F401  before the libraries, of which some speak while they are imported
from posttrain import DPSFTConfig, DPSFTTrainer, recipe
from posttrain.config import DataArguments, ModelArguments, get_quantization_config, parse
from posttrain.recipe import dry_run, instructions
from posttrain.run.report import RunReport


def main():
    data_args, model_args, training_args = parse((DataArguments, ModelArguments, DPSFTConfig))
    model, peft_config = recipe.named_model(data_args, model_args, training_args)
    train_dataset, eval_dataset = instructions.load(data_args, training_args)
    if training_args.dry_run:
        return dry_run.show(instructions.describe(model, training_args, train_dataset, peft_config, eval_dataset))

    trainer = DPSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        quantization_config=get_quantization_config(model_args),
        callbacks=[RunReport(sections={"data": vars(data_args), "model": vars(model_args)})],
    )
    recipe.train(trainer, data_args, evaluate=eval_dataset is not None)


if __name__ == "__main__":
    sys.exit(recipe.run_main(main))
