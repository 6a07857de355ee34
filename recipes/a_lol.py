"""Offline policy gradients from logged answers with a score each: A-LoL and its family.

    accelerate launch --config_file configs/accelerate/cpu.yaml recipes/a_lol.py \
        --config configs/a_lol/cpu.yaml --dataset_name answers.jsonl.gz

Settings are the fields of ScoredArguments, ModelArguments and ALoLConfig, in the YAML file or on the command line,
which wins. The script ends with exit code 2 for a bad setting, 3 for bad data, 4 for a missing package or connection, 5
for a run that diverged; `accelerate launch` itself turns each of them into 1.
"""

import sys

import posttrain.quiet  # noqa: F401  before the libraries, of which some speak while they are imported
from posttrain import ALoLConfig, ALoLTrainer, recipe
from posttrain.config import ModelArguments, get_quantization_config, parse
from posttrain.recipe import dry_run
from posttrain.recipe.scored_answers import ScoredArguments, describe, load_answers
from posttrain.run.report import RunReport


def main():
    data_args, model_args, training_args = parse((ScoredArguments, ModelArguments, ALoLConfig))
    model, peft_config = recipe.named_model(data_args, model_args, training_args)
    train_dataset, eval_dataset = load_answers(data_args, training_args)
    if training_args.dry_run:
        return dry_run.show(describe(model, training_args, data_args, train_dataset, peft_config, eval_dataset))

    trainer = ALoLTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        reward_func=data_args.reward_func,
        same_scale=data_args.same_scale,
        peft_config=peft_config,
        quantization_config=get_quantization_config(model_args),
        callbacks=[RunReport(sections={"data": vars(data_args), "model": vars(model_args)})],
    )
    recipe.train(trainer, data_args, evaluate=eval_dataset is not None)


if __name__ == "__main__":
    sys.exit(recipe.run_main(main))
