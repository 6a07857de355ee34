"""Noise on tokens in a run of SFTTrainer, and what it is for: tokens that a forward of generation is good for."""

import itertools
import math
import sys

import torch
from trl.models.utils import unwrap_model_for_generation

from posttrain.data.processing import generation_config
from posttrain.data.tokens import tokenizer_of
from posttrain.errors import ConfigError
from posttrain.generation import jacobi, support
from posttrain.log import get_logger
from posttrain.mechanisms.noise import draws, tokens
from posttrain.mechanisms.window import on_host


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
        # what depends on the tokens is done on the host, as each of its many steps would wait for the device
        names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs]
        [host] = on_host([{**inputs, "labels": labels}], (*names, "labels"))
        found = draws.sequences(host["input_ids"], host.get("attention_mask"), host.get("position_ids"))
        made = tokens.noisy(
            host["input_ids"], host["labels"], found, args.seed, trainer.state.global_step, args.token_noise_length,
            args.token_noise_prob, self._special,
        )  # fmt: skip
        self._check_some(made.is_noise.sum())
        means = trainer._means["train"]
        means.add_sum("noise/tokens", made.is_noise.sum(), made.learned)
        means.add_sum("noise/skipped", made.skipped, made.sequences)
        if not self._said and trainer.state.global_step == 0 and made.full:
            self._said = True
            get_logger().warning(
                "token_noise: rows are learned from their first token on, so prompts are noised like answers. Give "
                "rows as prompt and completion, or set `assistant_only_loss: true`."
            )
        return {**inputs, "input_ids": made.input_ids.to(ids.device, non_blocking=True)}

    def _check_some(self, replaced) -> None:
        """Raise ConfigError, on all ranks, where every row should have had noise in the first step and none had."""
        trainer = self._trainer
        if trainer.state.global_step == 0:
            self._replaced = replaced if self._replaced is None else self._replaced + replaced
            return
        if self._replaced is None:
            return
        total, self._replaced = trainer.accelerator.reduce(self._replaced.float().to(trainer.accelerator.device)), None
        if total == 0 and trainer.args.token_noise_prob == 1:
            raise ConfigError(
                "token_noise replaced no token in the first step: no answer has two tokens that are learned. Set "
                "`token_noise: none`, or check the rows."
            )


def check_accepted(model, args, config, peft_config, eval_dataset) -> None:
    """Refuse settings of `accepted_tokens_rows` that an evaluation would only trip over, before the weights load.

    Args:
        model: its name, or the model itself. config: the model's. peft_config: of a new adapter, or None.

    Raises:
        ConfigError: no evaluation set, and a model, an adapter or a generation config that generation by guesses does
            not take.
    """
    if not args.accepted_tokens_rows:
        return
    setting = f"accepted_tokens_rows is {args.accepted_tokens_rows}"
    if eval_dataset is None:
        raise ConfigError(
            f"{setting}, which evaluations alone read, and eval_dataset is missing. Give one, or leave "
            "accepted_tokens_rows out."
        )
    try:
        if isinstance(model, str):
            support.check_config(config)
            revision = (args.model_init_kwargs or {}).get("revision")
            support.check_generation_config(generation_config(model, revision))
        else:
            support.check_model(model)
        support.check_adapter(peft_config)
    except ConfigError as error:
        raise ConfigError(f"{setting}, and {error} Or leave accepted_tokens_rows out.") from None


def prompts(rows, length: int, positions: float) -> list[tuple[list[int], int]]:
    """Return each row's tokens in front of its answer, one at least, and how many new ones there is room for.

    Args:
        rows: of tokens, whose labels, if any, are -100 in front of the answer. length: new tokens, at most.
        positions: how many the model has.
    """
    found = []
    for row in rows:
        ids, labels = (_listed(row.get(name)) for name in ("input_ids", "labels"))
        first = next((place for place, label in enumerate(labels or ids) if label != -100), len(ids))
        prompt = ids[: max(first, 1)]
        # the last new token is not forwarded
        found.append((prompt, int(min(length, positions - len(prompt) + 1, sys.maxsize))))
    return found


def _listed(values) -> list[int]:
    return [] if values is None else values.tolist() if hasattr(values, "tolist") else list(values)


def accepted_tokens(trainer, dataset) -> float:
    """Return the new tokens a forward of Jacobi generation on a data set's first rows; the same on all ranks.

    A row with less room behind it than it needs, of a model with learned positions, has fewer new tokens, or none and
    counts for nothing, which is said once. NaN where no row has any.
    """
    args, accelerator = trainer.args, trainer.accelerator
    counts = torch.zeros(2, dtype=torch.float64)
    rows = itertools.islice(iter(dataset), min(args.accepted_tokens_rows, sys.maxsize))
    # upstream would switch recomputation on anew, with one more hook
    with trainer.plain_forward(), unwrap_model_for_generation(trainer.model_wrapped, accelerator) as model:
        found = prompts(rows, args.accepted_tokens_length, support.learned_positions(model))
        short = sum(room < args.accepted_tokens_length for _, room in found)
        for prompt, room in found[accelerator.process_index :: accelerator.num_processes]:
            if room < 1:
                continue
            ids = torch.tensor([prompt], device=accelerator.device)
            made = jacobi.generate(model, ids, max_new_tokens=room, seed=args.seed)
            counts += torch.tensor([made.new_tokens.sum().item(), made.forwards.sum().item()])
    if short and not getattr(trainer, "_said_short", False):
        trainer._said_short = True
        none = sum(room < 1 for _, room in found)
        get_logger().warning(
            "accepted_tokens_length is %d, for which the model has too few learned positions behind %d of %d rows: "
            "those generate what there is room for, and %d of them nothing.",
            args.accepted_tokens_length, short, len(found), none,
        )  # fmt: skip
    new, forwards = accelerator.reduce(counts.float().to(accelerator.device)).tolist()
    return new / forwards if forwards else math.nan
