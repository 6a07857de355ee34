"""Reinforcement learning with verifiable rewards against the quantile of a group: quantile advantages (QAE).

    accelerate launch --config_file configs/accelerate/cpu.yaml recipes/qae.py --config configs/qae/cpu.yaml

Settings are the fields of TaskArguments, ModelArguments and QAEConfig, in the YAML file or on the command line, which
wins. The script ends with exit code 2 for a bad setting, 3 for bad data, 4 for a missing package or connection, 5 for a
run that diverged; `accelerate launch` itself turns each of them into 1.
"""

import sys

import posttrain.quiet  # noqa: F401  before the libraries, of which some speak while they are imported
from posttrain import QAEConfig, QAETrainer
from posttrain.recipe import run_main
from posttrain.recipe.tasks import run


def main():
    run(QAETrainer, QAEConfig)


if __name__ == "__main__":
    sys.exit(run_main(main))
