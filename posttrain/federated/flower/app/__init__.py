"""A Flower app of federated LoRA, which `posttrain federated init` copies: make `task.py` your own."""
