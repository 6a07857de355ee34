"""The reference's log-probabilities: who is forwarded, by which key they are cached."""

import contextlib
import json
from collections.abc import Iterable, Sequence

import torch
import transformers
import xxhash
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from trl.models import prepare_deepspeed

from posttrain import __version__
from posttrain.errors import ConfigError, PosttrainError
from posttrain.mechanisms import initial_adapter
from posttrain.mechanisms.sequence_cache import weights_digest
from posttrain.run.checks import evaluating

# |log pi - log pi_ref| per completion token at step 0, where policy and reference are the same weights. The two passes
# may differ in padding and batch only, so what is left is rounding: seen below 1e-6 in fp32, and below 0.025 in bf16 of
# eight short answers together. An adapter left out of the reference moves it by 0.05 nats and more.
ZERO_MARGIN_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_EXACT = (torch.float32, torch.float64)
# fewer tokens than that do not average their rounding away: seen 0.12 nats per token of answers of 6 tokens in bf16
_FEW_TOKENS = 32


def reference_key(trainer, model, skip_adapters: Iterable[str], facts: dict) -> str:
    """Digest everything but the rows that affects a reference log-probability; all ranks call it.

    Args:
        model: the one that is forwarded, without the adapters of `skip_adapters`.
        facts: what else the values depend on, by name.
    """
    weights = gather_object([weights_digest(model, skip_adapters=skip_adapters)])
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "pad_token_id"):
        config.pop(name, None)
    facts = facts | {
        "weights": weights,
        "config": config,
        "attention": model.config._attn_implementation,
        "precision": [trainer.accelerator.mixed_precision, str(model.dtype)],
        "device": trainer.accelerator.device.type,
        # equal to rounding only, and `never` is to equal TRL's numbers bit for bit
        "prefix_sharing": trainer._sharing.active,
        "versions": [torch.__version__, transformers.__version__, __version__],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True, default=str).encode())


def cached(trainer, cache, digests: Sequence[bytes]) -> dict:
    """Read the values of the rows with these digests from a cache; all ranks call it and get what rank 0 sees.

    Ranks may not share a disk, and may see it at different moments. Raises EnvironmentIssue, on all of them, where it
    may not be read.
    """

    def read() -> dict:
        there = cache.load()
        return {digest: there[digest] for digest in digests if digest in there}

    return _by_main(trainer, read)


@contextlib.contextmanager
def kept(trainer, cache):
    """Yield a function that takes fresh values by their digests; rank 0 writes them into a cache as they come.

    All ranks call it. Raises EnvironmentIssue, on all of them, where the cache cannot be written, at first of all.
    """
    _by_main(trainer, cache.check_writable)
    if not trainer.accelerator.is_main_process:
        yield lambda values: None
        _by_main(trainer, None)
        return
    with cache.pending() as pending:
        yield pending.add
        _by_main(trainer, pending.flush)


def _by_main(trainer, do):
    """Return on all ranks what `do` returns on rank 0, or raise what it raises there of our errors."""
    told = [None, None]
    if trainer.accelerator.is_main_process:
        try:
            told[0] = do()
        except PosttrainError as error:
            told[1] = error
    broadcast_object_list(told, from_process=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def with_columns(dataset: Dataset, columns: dict[str, list]) -> Dataset:
    """Add columns to a data set, replacing those of the same names."""
    for name, values in columns.items():
        if name in dataset.column_names:
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, values)
    return dataset


def starts_as_identity(peft_config) -> bool:
    """Return whether a new adapter of these settings leaves outputs and base as they are until its first step."""
    return (
        initial_adapter.begins_as_base(peft_config)
        and initial_adapter.initialisation(peft_config) in (True, "gaussian", "mica")
        and not getattr(peft_config, "use_dora", False)
        and getattr(peft_config, "bias", "none") == "none"
    )


@contextlib.contextmanager
def frozen(trainer):
    """Yield the starting model for forwards: in eval mode, without gradient, a new adapter off.

    Under DeepSpeed it is an engine that places or gathers the weights.
    """
    model = forwarded_model(trainer)
    adapter = contextlib.nullcontext()
    if trainer.adapter_is_new:
        adapter = trainer.switches.adapter(None)
    with torch.no_grad(), evaluating(model), trainer.plain_forward(), adapter, trainer.accelerator.autocast():
        yield model


def batches_of(trainer, rows: Dataset, what: str, batch_size: int):
    """Yield this rank's padded batches of tokenised rows, in order, on its device."""
    # An own generator: a DataLoader otherwise draws from the global one
    loader = DataLoader(rows, batch_size, collate_fn=trainer.data_collator, generator=torch.Generator())
    hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    return tqdm(trainer.accelerator.prepare_data_loader(loader), desc=what, disable=hidden)


def forwarded_model(trainer):
    if not trainer.is_deepspeed_enabled:
        return trainer.model
    if trainer.model_wrapped is not trainer.model:
        return trainer.model_wrapped
    if trainer.reference_engine is None:
        # The policy is not prepared yet: an inference engine places its weights, or gathers them under ZeRO-3
        trainer.reference_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
    return trainer.reference_engine


def end_engine(trainer) -> None:
    """Take the inference engine's hooks off the model.

    The training engine numbers the modules anew, and hooks of ZeRO-3 that saw a single forward would trip over that.
    """
    if trainer.reference_engine is not None:
        trainer.reference_engine.destroy()
        trainer.reference_engine = None


def may_be_identity(model) -> bool:
    """Return whether an adapter can be without effect; one of learned prompts or prefixes never is."""
    return not (is_peft_model(model) and model.active_peft_config.is_prompt_learning)


def gap_at_start(trainer, differences: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return how far policy and reference are apart at step 0, in nats per token, over all ranks; all of them call it.

    In fp32 it is that of the sequence where it is largest. In low precision it is that of all sequences together: the
    two passes differ in shapes, and a short answer does not average the rounding of its tokens away.

    Args:
        differences: (R,) log pi - log pi_ref of each sequence, summed over its scored tokens, in nats.
        tokens: (R,) how many those are.
    """
    gaps = differences.detach().float().abs()
    worst = (gaps / tokens.clamp(min=1)).max()
    own = torch.stack([worst, gaps.sum(), tokens.sum().to(worst)])
    found = trainer.accelerator.gather(own.unsqueeze(0))
    if _rounding(trainer.model, trainer.accelerator)[0] in _EXACT:
        return found[:, 0].max().item()
    total, count = found[:, 1:].sum(dim=0).tolist()
    return total / max(count, _FEW_TOKENS)


def zero_margin_tolerance(model, accelerator) -> tuple[float, str]:
    """Return the rounding of |log pi - log pi_ref| per token of equal weights, in nats, and the computing dtype."""
    dtype, name = _rounding(model, accelerator)
    return ZERO_MARGIN_TOLERANCE.get(dtype, 3e-2), name


def _rounding(model, accelerator) -> tuple[torch.dtype, str]:
    """Return the dtype that a forward rounds as, and its name."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, model.dtype)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        dtype = torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    on_cuda = accelerator.device.type == "cuda"
    if dtype == torch.float32 and on_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        # as many bits of a factor as in fp16
        return torch.float16, "float32 by TF32"
    return dtype, name


def check_zero_margin(gap: float, model, accelerator, reference: str) -> None:
    """Raise if policy and reference differ at step 0 by more than rounding.

    Args:
        gap: what `gap_at_start` found in the first micro-batches, in nats per token.
        reference: which weights the reference is, for the message.
    """
    tolerance, dtype = zero_margin_tolerance(model, accelerator)
    if not gap <= tolerance:
        raise ConfigError(
            f"policy and reference differ by {gap:.3g} nats per token before the first step (tolerance "
            f"{tolerance:g} in {dtype}). The reference is: {reference}. If it should be "
            "other weights, pass `ref_model`; if an adapter was trained before, load it as a PeftModel"
            f"{_initialised(model)}; if this is intended, set `check_reference: false`."
        )


def _initialised(model) -> str:
    """Say in an error message what part an adapter's own initialisation has in it."""
    if not is_peft_model(model):
        return ""
    config = model.active_peft_config
    for name in ("init_lora_weights", "init_weights"):
        value = getattr(config, name, True)
        if value is not True:
            return f"; the adapter begins with {name} {value!r}, which may be no identity"
    return ""


def describe_reference(trainer) -> str:
    """Say in one line which weights the reference is."""
    if trainer._reference_is_given:
        return "the given ref_model"
    if is_peft_model(trainer.model):
        if "ref" in trainer.model.peft_config:
            return "a frozen copy of the adapter as it began (`ref`)"
        return "the base model, with the adapter off"
    if trainer.ref_model is not None:
        return f"the model as loaded from {trainer.model.config._name_or_path}"
    return "the model before its first step (log-probabilities precomputed)"
