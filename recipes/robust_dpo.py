"""Preference training where some labels are wrong: rDPO, Dr. DPO, cDPO and DPO; also differentially private.

    accelerate launch --config_file configs/accelerate/cpu.yaml recipes/robust_dpo.py \
        --config configs/robust_dpo/cpu.yaml --dataset_name pairs.jsonl.gz --flip_rate 0.2

Settings are the fields of DataArguments, ModelArguments and RobustDPOConfig, in the YAML file or on the command line,
which wins; with any of PrivacyConfig's the run is differentially private. The script ends with exit code 2 for a bad
setting, 3 for bad data, 4 for a missing package or connection; `accelerate launch` itself turns each of them into 1.
"""

import sys

import posttrain.quiet  # noqa: F401  before the libraries, of which some speak while they are imported
from posttrain import RobustDPOConfig, RobustDPOTrainer, recipe
from posttrain.config import DataArguments, ModelArguments, get_quantization_config, parse
from posttrain.privacy.config import PrivacyConfig
from posttrain.recipe import dry_run, preferences
from posttrain.run.report import RunReport


def main():
    sections = (DataArguments, ModelArguments, RobustDPOConfig, PrivacyConfig | None)
    data_args, model_args, training_args, privacy = parse(sections)
    model, peft_config = recipe.named_model(data_args, model_args, training_args)
    train_dataset, eval_dataset = preferences.load(data_args, training_args, privacy)
    if training_args.dry_run:
        given = dict(eval_dataset=eval_dataset, privacy=privacy)
        return dry_run.show(preferences.describe(model, training_args, train_dataset, peft_config, **given))

    trainer = RobustDPOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        quantization_config=get_quantization_config(model_args),
        callbacks=[RunReport(sections={"data": vars(data_args), "model": vars(model_args)})],
        privacy=privacy,
    )
    recipe.train(trainer, data_args, evaluate=eval_dataset is not None)


if __name__ == "__main__":
    sys.exit(recipe.run_main(main))
