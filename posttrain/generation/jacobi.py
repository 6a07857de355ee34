"""Greedy generation that checks several guessed tokens in each forward: linear Jacobi decoding.

The guesses are the model's own predictions from the forward before, which stood behind a token that was wrong; missing
ones are drawn from the text so far. A guess is accepted where it is what the model says: the tokens are those of
ordinary greedy generation, whatever is guessed, and a good guess saves a forward. Models trained with
`token_noise: msn` (arXiv 2406.17404) guess better.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError

# of a GenerationConfig: what changes logits, with the value at which it does not
_PENALTIES = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "watermarking_config": None,
}


class Generated(NamedTuple):
    """Rows with what was generated.

    Attributes:
        sequences: (B, T + N), the rows given and the new tokens, filled up on the right with `pad_token_id`.
        new_tokens: (B,), how many are new.
        forwards: (B,), forwards that a row took.
    """

    sequences: Tensor
    new_tokens: Tensor
    forwards: Tensor

    @property
    def accepted_tokens(self) -> float:
        """New tokens a forward: 1 for ordinary generation."""
        return self.new_tokens.sum().item() / max(self.forwards.sum().item(), 1)


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    draft_tokens: int = 5,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
) -> Generated:
    """Generate greedily, and check `draft_tokens` guessed tokens in each forward.

    Rows are gone through one by one, each with a cache of its own. The tokens are those of `model.generate(...,
    do_sample=False)` but where two logits are equal up to rounding. Runs in eval mode and leaves the mode as it was.

    Args:
        model: a causal language model or a PeftModel.
        input_ids: (B, T), prompts of at least one token each.
        attention_mask: (B, T), 0 for padding on either side; None where no token is padding.
        max_new_tokens: 1 or more, for each row.
        draft_tokens: guesses a forward; 0 for ordinary greedy generation.
        eos_token_id: what ends a row; the generation config's where None.
        pad_token_id: what fills rows up; the generation config's, or else what ends a row, or 0.
        seed: of the guesses drawn from the text.

    Raises:
        ConfigError: for a number out of range, a row without a token, penalties in the generation config, an
            encoder-decoder, and a model whose cache cannot give tokens back.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.generation_config
    _check(inner, config, input_ids, attention_mask, max_new_tokens, draft_tokens)
    ends = config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    if pad_token_id is None:
        pad_token_id = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows, forwards, was_training = [], [], model.training
    model.eval()
    try:
        for ids, real in zip(input_ids, mask.bool(), strict=True):
            random = torch.Generator().manual_seed(seed)
            made, count = _row(model, inner, ids[real], max_new_tokens, draft_tokens, set(ends), random)
            rows.append(made)
            forwards.append(count)
    finally:
        model.train(was_training)
    filled = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    counts = torch.tensor([len(row) for row in rows], device=input_ids.device)
    forwards = torch.tensor(forwards, device=input_ids.device)
    return Generated(torch.cat([input_ids, filled], dim=1), counts, forwards)


def _check(inner, config, input_ids, attention_mask, max_new_tokens, draft_tokens) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("draft_tokens", draft_tokens, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of {least} or more.")
    if input_ids.dim() != 2:
        raise ConfigError(f"input_ids is {tuple(input_ids.shape)}; it must be of two dimensions, (rows, tokens).")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ConfigError(
            f"attention_mask is {tuple(attention_mask.shape)}; it must have the shape of input_ids, "
            f"{tuple(input_ids.shape)}."
        )
    tokens = input_ids.size(1) if attention_mask is None else attention_mask.bool().sum(dim=1).min()
    if len(input_ids) == 0 or tokens == 0:
        raise ConfigError("input_ids has a row without a token, after which nothing can be generated.")
    if inner.config.is_encoder_decoder:
        raise ConfigError(
            f"the model is a {type(inner).__name__}, an encoder-decoder; a causal language model is needed."
        )
    for name, neutral in _PENALTIES.items():
        value = getattr(config, name, None)
        if value not in (None, neutral, []):
            raise ConfigError(
                f"the generation config has {name} {value!r}, which generation by guesses does not apply. Set "
                f"`model.generation_config.{name} = {neutral!r}`, or use `model.generate`."
            )


def _row(model, inner, prompt: Tensor, limit: int, drafts: int, ends: set, random) -> tuple[Tensor, int]:
    """Return the new tokens of a row, at most `limit`, and the number of forwards."""
    from transformers import DynamicCache

    cache = DynamicCache(config=inner.config)
    # layers of a sliding window keep what a wrong guess would push out
    cache.activate_past_recording()
    if not cache.is_croppable:
        raise ConfigError(
            f"the cache of {type(inner).__name__} cannot give tokens back, which wrong guesses need. Use "
            "`model.generate`."
        )
    text, entered, guesses, forwards = prompt.tolist(), 0, [], 0
    length = len(text) + limit
    while len(text) < length:
        wanted = min(drafts, length - len(text) - 1)
        guesses = guesses[:wanted]
        picks = torch.randint(len(text), (wanted - len(guesses),), generator=random).tolist()
        guesses += [text[pick] for pick in picks]
        block = torch.tensor([text[entered:] + guesses], device=prompt.device)
        mask = torch.ones(1, len(text) + len(guesses), dtype=torch.long, device=prompt.device)
        logits = model(input_ids=block, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        said = logits[0, -len(guesses) - 1 :].argmax(dim=-1).tolist()
        forwards += 1
        right = 0
        while right < len(guesses) and guesses[right] == said[right]:
            right += 1
        entered = len(text) + right
        # none as well: layers of a sliding window then let go what lies outside
        cache.crop(right - len(guesses))
        for token in said[: right + 1]:
            text.append(token)
            if token in ends:
                return torch.tensor(text[len(prompt) :], device=prompt.device), forwards
        guesses = said[right + 1 :]
    return torch.tensor(text[len(prompt) :], device=prompt.device), forwards
