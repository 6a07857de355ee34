"""Reinforcement learning with verifiable rewards that falls back on demonstrations: hybrid post-training (HPT).

    accelerate launch --config_file configs/accelerate/cpu.yaml recipes/hpt.py --config configs/hpt/cpu.yaml

Settings are the fields of TaskArguments, ModelArguments and HPTConfig, in the YAML file or on the command line, which
wins. The script ends with exit code 2 for a bad setting, 3 for bad data, 4 for a missing package or connection, 5 for a
run that diverged; `accelerate launch` itself turns each of them into 1.
"""

import sys

import posttrain.quiet  # noqa: F401  before the libraries, of which some speak while they are imported
from posttrain import HPTConfig, HPTTrainer
from posttrain.recipe import run_main
from posttrain.recipe.tasks import run


def main():
    run(HPTTrainer, HPTConfig)


if __name__ == "__main__":
    sys.exit(run_main(main))
