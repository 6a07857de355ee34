"""Noise on tokens in a run of SFTTrainer, and what it is for: tokens that a forward of generation is good for."""

import itertools

import torch
from trl.models.utils import unwrap_model_for_generation

from posttrain.data.tokens import tokenizer_of
from posttrain.errors import ConfigError
from posttrain.generation import jacobi
from posttrain.log import get_logger
from posttrain.mechanisms.noise import draws, tokens


class TokenNoise:
    """Replaces pieces of answers in the batches of a trainer, and counts them in its metrics."""

    def __init__(self, trainer) -> None:
        self._trainer, self._said = trainer, False
        # tokens replaced in the run's first step, until they are looked at
        self._replaced = None
        special = None
        if not trainer.args.token_noise_copies_special:
            special = torch.tensor(sorted(set(tokenizer_of(trainer.processing_class).all_special_ids)))
        self._special = special

    def added_to(self, inputs: dict) -> dict:
        """Return a batch with other tokens and the labels that it had."""
        trainer, args, ids = self._trainer, self._trainer.args, inputs["input_ids"]
        labels = trainer.learned_of_data(inputs)["labels"] if "real_rows" in inputs else inputs["labels"]
        found = draws.sequences(ids, inputs.get("attention_mask"), inputs.get("position_ids"))
        special = None if self._special is None else self._special.to(ids.device)
        made = tokens.noisy(
            ids, labels, found, args.seed, trainer.state.global_step, args.token_noise_length, args.token_noise_prob,
            special,
        )  # fmt: skip
        self._check_some(made.is_noise.sum())
        means = trainer._means["train"]
        means.add_sum("noise/tokens", made.is_noise.sum(), made.learned)
        means.add_sum("noise/skipped", made.skipped, made.sequences)
        # a number is read off the device in the first step alone
        if not self._said and trainer.state.global_step == 0 and made.full:
            self._said = True
            get_logger().warning(
                "token_noise: rows are learned from their first token on, so prompts are noised like answers. Give "
                "rows as prompt and completion, or set `assistant_only_loss: true`."
            )
        return {**inputs, "input_ids": made.input_ids}

    def _check_some(self, replaced) -> None:
        """Raise ConfigError, on all ranks, where every row should have had noise in the first step and none had."""
        trainer = self._trainer
        if trainer.state.global_step == 0:
            self._replaced = replaced if self._replaced is None else self._replaced + replaced
            return
        if self._replaced is None:
            return
        total, self._replaced = trainer.accelerator.reduce(self._replaced.float()), None
        if total == 0 and trainer.args.token_noise_prob == 1:
            raise ConfigError(
                "token_noise replaced no token in the first step: no answer has two tokens that are learned. Set "
                "`token_noise: none`, or check the rows."
            )


def accepted_tokens(trainer, dataset) -> float:
    """Return the new tokens a forward of Jacobi generation on a data set's first rows; the same on all ranks."""
    args, accelerator = trainer.args, trainer.accelerator
    rows = list(itertools.islice(iter(dataset), args.accepted_tokens_rows))
    mine, counts = rows[accelerator.process_index :: accelerator.num_processes], torch.zeros(2, dtype=torch.float64)
    with unwrap_model_for_generation(trainer.model_wrapped, accelerator) as model:
        for row in mine:
            labels = row.get("labels") or row["input_ids"]
            first = next((place for place, label in enumerate(labels) if label != -100), len(labels))
            prompt = torch.tensor([row["input_ids"][: max(first, 1)]], device=accelerator.device)
            made = jacobi.generate(model, prompt, max_new_tokens=args.accepted_tokens_length, seed=args.seed)
            counts += torch.tensor([made.new_tokens.sum().item(), made.forwards.sum().item()])
    new, forwards = accelerator.reduce(counts.float().to(accelerator.device)).tolist()
    return new / max(forwards, 1)
