"""Federated LoRA: several data holders train one adapter by FedSVD and others, in one process; also private.

    accelerate launch --config_file configs/accelerate/cpu.yaml recipes/fedsvd.py \
        --config configs/fedsvd/cpu.yaml --dataset_name instructions.jsonl.gz --partition_column topic

Settings are the fields of DataArguments, ModelArguments, NoisySFTConfig (a client's turn: its max_steps are the local
steps) and FederatedConfig, in the YAML file or on the command line, which wins; with any of PrivacyConfig's each client
trains with differential privacy, and the promise is of all its rounds. The script ends with exit code 2 for a bad
setting, 3 for bad data, 4 for a missing package or connection; `accelerate launch` itself turns each of them into 1.
"""

import sys

import posttrain.quiet  # noqa: F401  before the libraries, of which some speak while they are imported
from posttrain import NoisySFTConfig, recipe
from posttrain.config import DataArguments, ModelArguments, parse
from posttrain.federated.config import FederatedConfig
from posttrain.privacy.config import PrivacyConfig
from posttrain.recipe import dry_run, federated


def main():
    sections = (DataArguments, ModelArguments, NoisySFTConfig, FederatedConfig, PrivacyConfig | None)
    data_args, model_args, training_args, config, privacy = parse(sections)
    model, peft_config = recipe.named_model(data_args, model_args, training_args)
    args = training_args if privacy is None else training_args.as_private(privacy)
    clients, held_out = federated.load(data_args, args, config)
    if args.dry_run:
        return dry_run.show(federated.describe(model, args, config, clients, peft_config, held_out))

    federated.train(
        model,
        args,
        config,
        clients,
        peft_config,
        held_out,
        sections={"data": vars(data_args), "model": vars(model_args)},
    )


if __name__ == "__main__":
    sys.exit(recipe.run_main(main))
