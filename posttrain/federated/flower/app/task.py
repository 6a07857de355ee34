"""What server and clients have in common: the base model and its LoRA; and what a client does in a round.

`settings` are those of the run: `[tool.flwr.app.config]` in pyproject.toml, and `flwr run --run-config`, which wins.
"""

import json
import tempfile

from posttrain.federated.flower.settings import listed_in


def adapted(settings):
    """Return the base model with a LoRA, the same one on the server and on every node."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    from posttrain.models import resolve_model

    model = AutoModelForCausalLM.from_pretrained(resolve_model(settings["model"]), dtype="float32")
    # A of the server's is sent; that of a node is replaced
    set_seed(settings["seed"])
    lora = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        target_modules=listed_in(settings, "targets"),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def rows(node):
    """Return the rows of a node's client: JSON lines in the file that its holder names, by `data` of its config."""
    from datasets import Dataset

    # in memory: `load_dataset` would leave a copy of the rows in a cache
    with open(node.config["data"], encoding="utf-8") as file:
        return Dataset.from_list([json.loads(line) for line in file if line.strip()])


def builder(settings):
    """Return the function that makes the trainer of a client's turn."""

    def build(model, rows, seed):
        import torch
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        from posttrain.models import resolve_model

        args = SFTConfig(
            # nothing is written; a folder of its own would be made, and stay
            tempfile.gettempdir(),
            max_steps=settings["local-steps"],
            per_device_train_batch_size=settings["batch-size"],
            optim=settings["optimizer"],
            learning_rate=settings["learning-rate"],
            lr_scheduler_type="constant",
            max_length=settings["max-length"],
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(settings["model"]))
        return SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)

    return build
