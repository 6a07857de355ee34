"""An adapter folded into its base model, for `posttrain merge` and `posttrain push --merged`."""

import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from posttrain.adapters.loading import UNFIT, base_of, load_adapter, placed, tokenizer_beside
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.hub.files import TOKENIZER, saved_weights
from posttrain.hub.own_files import found, name_links
from posttrain.log import get_logger
from posttrain.saved import read_json

_PROMPTS = (
    "The capital of France is Paris, which lies on the river",
    "Water boils at a temperature of one hundred degrees Celsius at sea level, and in the mountains at",
    "To sort a list in Python, call sorted(items), or items.sort() where the list itself may change:",
    "Once upon a time, in a small village at the edge of a great forest, there lived an old clockmaker who",
    "If 3 apples cost 6 coins, then 7 apples cost 14 coins, because each apple costs",
)
# Where a run notes what it was.
_NOTES = ("posttrain_run.json", "posttrain_complete.json")
# Share of tokens of which merged and unmerged model must agree on the likeliest next one. Where the unmerged model
# gives the merged one's choice nearly its best logit, they agree: rounding may decide such ties either way.
LEAST_AGREEMENT = 0.95


class Agreement(NamedTuple):
    """How a merged model, as saved, compares with base and adapter.

    Attributes:
        tokens: on how many tokens.
        largest_logit_difference: of any two logits.
        top1_agreement: share of tokens with the same likeliest next token, or a tie but for rounding.
    """

    tokens: int
    largest_logit_difference: float
    top1_agreement: float


def merge_adapter(run: str | Path, folder: str | Path, base: str | None = None, dtype: str = "auto") -> Agreement:
    """Write into `folder` the base model with the run's adapter merged into it.

    The run's tokenizer goes with it, or else the base's. The merged model is written beside `folder`, loaded again and
    compared with base and adapter, and only then gets its name: nothing is left where something goes wrong. A base
    that is not the one that the run noted is said in the log.

    Args:
        run: folder of the adapter.
        folder: of the merged model; missing or empty.
        base, dtype: as in `posttrain.adapters.loading.load_adapter`, whose errors come through.

    Raises:
        ConfigError: an adapter that has no place in the weights, such as a learned prompt.
        EnvironmentIssue: merged and unmerged model agree on fewer tokens than `LEAST_AGREEMENT`.
    """
    folder = Path(folder).absolute()
    base_of(run, base)
    # a link in an adapter's folder may lead to any file of this machine
    saved_weights(Path(run))
    name_links(Path(run), TOKENIZER)
    files = found(Path(run), TOKENIZER)
    model = load_adapter(run, base, dtype, to_merge=True)
    if model.active_peft_config.is_prompt_learning:
        raise ConfigError(
            f"the adapter in {run} is of learned prompts ({model.active_peft_config.peft_type.value}), which change no "
            "weight: there is nothing to merge. Keep it beside its base; push it without --merged."
        )
    if _is_trained_on(model, Path(run)) is False:
        get_logger().warning(
            "the base %s does not have the weights, or not in this precision, that the adapter in %s was trained on; "
            "what is merged is then another model than the one that was trained. --base MODEL names the base.",
            model.get_base_model().config._name_or_path, run,
        )  # fmt: skip
    tokenizer = tokenizer_beside(run, base, own="tokenizer_config.json" in files)
    # after its weights were compared with what the run noted of them
    model = placed(model)
    before = [_logits(model, tokenizer, prompt) for prompt in _PROMPTS]
    above = next(path for path in folder.parents if path.exists())
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=above) as temporary:
        partial = Path(temporary) / folder.name
        try:
            merged = _merged(model)
            merged.save_pretrained(partial)
        except UNFIT as error:
            raise ConfigError(
                f"the adapter in {run} cannot be merged: {str(error).rstrip('.')}. Keep it beside its base; push it "
                "without --merged."
            ) from error
        for name, path in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / name)
        if not files:
            tokenizer.save_pretrained(partial)
        del model, merged
        agreement = _compared(before, partial, tokenizer, dtype)
        if not agreement.top1_agreement >= LEAST_AGREEMENT:
            raise EnvironmentIssue(
                f"the merged model is another one than base and adapter: they agree on the likeliest next token of "
                f"{agreement.top1_agreement:.1%} of {agreement.tokens} tokens ({LEAST_AGREEMENT:.0%} is the least; "
                f"largest logit difference {agreement.largest_logit_difference:.3g}). Nothing was written. Try --dtype "
                "float32, or keep the adapter beside its base."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rmdir()
        os.rename(partial, folder)
    return agreement


def _is_trained_on(model, run: Path) -> bool | None:
    """Tell whether a base has the weights that a run trained its adapter on.

    None where the run's folder does not tell.
    """
    from posttrain.mechanisms.base_digests import base_digests

    then = next(filter(None, (_base_weights(run / name) for name in _NOTES)), None)
    # biases that the run trained are no longer told from frozen ones
    if then is None or getattr(model.active_peft_config, "bias", "none") != "none":
        return None
    ways = ({}, {"adapter_took_from_base": True}, {"was_quantised": True})
    return then in (base_digests(model, **way).get("base_weights") for way in ways)


def _base_weights(note: Path) -> str | None:
    try:
        return read_json(note)["identity"]["base_weights"]
    # a folder of another program, or of a run whose weights were spread over processes
    except (DataError, KeyError, TypeError):
        return None


def _merged(model):
    """Return the base with the adapter in its weights.

    Embeddings that were tied are apart where the adapter parts them.
    """
    import torch

    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    if tied:
        # an adapter on one of the two would otherwise be merged into both
        while not isinstance(head, torch.nn.Linear) or hasattr(head, "base_layer"):
            inner = getattr(head, "base_layer", None) or getattr(head, "original_module", None)
            if inner is None:
                break
            head = inner
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True` and the tied_target_modules")
        merged = model.merge_and_unload(safe_merge=True)
    if tied:
        embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
        still = torch.equal(embedding.weight, head.weight)
        if still:
            head.weight = embedding.weight
        for config in {id(config): config for config in (merged.config, merged.config.get_text_config())}.values():
            config.tie_word_embeddings = still
    return merged


def _compared(before: list, folder: Path, tokenizer, dtype: str) -> Agreement:
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    reloaded = placed(reloaded)
    after = [_logits(reloaded, tokenizer, prompt) for prompt in _PROMPTS]
    tokens = sum(len(logits) for logits in before)
    largest = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
    same = sum(_agreed(a, b, reloaded.dtype) for a, b in zip(after, before, strict=True))
    return Agreement(tokens, largest, same / tokens)


def _agreed(after, before, dtype) -> int:
    """Count the rows (L, V) of which the likeliest token is the same, or rounding to `dtype` could make it so."""
    import torch

    chosen = before.gather(1, after.argmax(-1, keepdim=True))[:, 0]
    best, scale = before.max(-1).values, before.abs().amax(-1)
    return (best - chosen <= 4 * torch.finfo(dtype).eps * scale).sum().item()


def _logits(model, tokenizer, prompt: str):
    import torch

    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float().cpu()
