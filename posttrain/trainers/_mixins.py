"""What the trainers of a family share. Each public trainer is (one of these mixins, TRL's trainer)."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from posttrain.compat import keep_4bit_weights_trainable
from posttrain.data import schema
from posttrain.hub import clean_readme, preflight, push_checkpoint, push_run, write_model_card
from posttrain.log import get_logger
from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.mechanisms.window import Window, count_rows, real_rows
from posttrain.models import resolve_model
from posttrain.reporting import RunReport
from posttrain.trainers import _checkpoints, _checks, _reference
from posttrain.trainers._guards import FiniteLoss, LiveGradients, stop

# Columns of a batch that are ours or the loss's, not the model's
_NOT_FOR_THE_MODEL = {
    "completion_mask",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "flip_rate",
    "real_rows",
    "pair_coefficients",
    "pair_weights",
}


@dataclass
class PairScores:
    """What one forward says about a batch of pairs.

    Attributes:
        chosen_logps, rejected_logps: (B,) summed log-probabilities of the completions in nats, fp32.
        outputs: the fused head's per-token fields, (2B, L - 1), chosen rows first.
        shift_mask: (2B, L - 1) 1 where the next token belongs to the completion.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    outputs: Any
    shift_mask: Tensor


class PreferenceMixin:
    """Preference training in four seams: `score`, `pair_losses`, `reduce_pairs`, `extra_metrics`.

    Every pass over the model (policy, reference, precompute, window scoring, evaluation) goes through `score`. The
    mean over pairs is taken over the optimiser step's global batch, whatever its split; metrics are kept as sums and
    counts and reduced once per log.
    """

    _config_class: type

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *rest,
        **kwargs,
    ):
        args = _checks.check_args(args, self._config_class)
        _checks.check_output_dir(args.output_dir)
        peft_config = kwargs.get("peft_config")
        if peft_config is not None:
            _checks.check_lora(peft_config)
        if isinstance(model, str):
            model = resolve_model(model)
        config = model.config if isinstance(model, torch.nn.Module) else _checks.load_config(model, args)
        _checks.check_model_config(args, config)
        schema.check_run(model, processing_class, args, train_dataset, eval_dataset)
        _checks.check_flip_rates(args, train_dataset, eval_dataset)
        self.hub_destination = preflight(args, model)
        self._means = {"train": MeanMetrics(), "eval": MeanMetrics()}
        self._reference_is_given = ref_model is not None
        self._margin_checked = False
        self._known_identity = self.reference_key = None
        self._finite_loss, self._live_gradients = FiniteLoss(), None
        with _checks.upstream_refusals():
            super().__init__(
                model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, *rest, **kwargs
            )
        _checks.check_parallelism(self.accelerator)
        keep_4bit_weights_trainable(self.model)
        self.data_collator = _PairColumns(self.data_collator)
        if not any(isinstance(callback, RunReport) for callback in self.callback_handler.callbacks):
            self.add_callback(RunReport())
        self.add_callback(_checkpoints.RunFolder(self))
        get_logger().info("reference: %s", _reference.describe(self))

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as `transformers.Trainer.train` does, resuming only from complete checkpoints.

        Args:
            resume_from_checkpoint: a path; True for the newest complete checkpoint in `output_dir`; "auto" for that one
                if there is any.

        Raises:
            ConfigError: no complete checkpoint where one is asked for, or one of another method, data or batch split.
            DivergedError: the loss or the gradient became NaN or infinite, or adapter tensors get no gradient.
        """
        checkpoint = _checkpoints.find(self.args.output_dir, resume_from_checkpoint)
        if checkpoint is not None:
            content = _checkpoints.read(checkpoint, self._identity() if self.args.check_resume else None)
            self._total_train_tokens = content["state"]["num_tokens"]
        self._live_gradients = None
        output = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        if self._live_gradients:
            self._live_gradients.after_step(self)
        return output

    def _identity(self) -> dict:
        if self._known_identity is None:
            self._known_identity = _checkpoints.identity(self)
        return self._known_identity

    def identity_settings(self) -> dict:
        """Settings of the method that a resumed run must share with the one it goes on from."""
        return {}

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the adapter or model; all ranks call it. No local path is left in the card that PEFT writes."""
        # not upstream's own push from here: it would come before the card, and push_to_hub is called after it anyway
        super().save_model(output_dir, _internal_call=True)
        if self.is_world_process_zero():
            clean_readme(output_dir or self.args.output_dir, self.args.base_model_id)

    # stands on Trainer.push_to_hub: saves first, on all ranks, and never fails the run
    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """Save, write the card and push to the hub; a push that fails is a warning with the command that retries."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return push_run(self, commit_message, blocking=blocking, token=token, revision=revision)

    # stands on Trainer.init_hf_repo, which would ask the hub again, once and without another try
    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id = self.hub_destination.repo_id
        self.push_in_progress = None

    # stands on Trainer._push_from_checkpoint
    def _push_from_checkpoint(self, checkpoint_folder):
        push_checkpoint(self, checkpoint_folder)

    # stands on DPOTrainer._save_checkpoint, and through it on Trainer's
    def _save_checkpoint(self, model, trial):
        with _checkpoints.complete_or_not_there(self):
            super()._save_checkpoint(model, trial)

    # stands on Trainer._clip_grad_norm, the last call before the optimiser's step
    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        # in fp16 the gradient scaler skips such steps by itself
        if norm is not None and not self.args.fp16 and not math.isfinite(norm):
            stop(self, "the gradient")
        return norm

    # stands on DPOTrainer._set_signature_columns_if_needed
    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "flip_rate" not in self._signature_columns:
            self._signature_columns.append("flip_rate")

    # stands on DPOTrainer._prepare_dataset, which would look for text again
    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if not {"prompt_ids", "chosen_ids", "rejected_ids"}.issubset(dataset.column_names or ()):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is None or args.truncation_mode != "keep_start":
            return dataset
        return dataset.filter(_is_shorter, input_columns=["prompt_ids"], fn_kwargs={"limit": args.max_length})

    def score(self, model, batch) -> PairScores:
        """Run `model` on a padded batch of pairs (chosen rows first) and sum the log-probabilities of each completion.

        With `ld_alpha`, tokens beyond the shorter completion of a pair count `ld_alpha` (LD-DPO).
        """
        mask = batch["completion_mask"]
        kwargs = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        outputs = model(**kwargs, use_cache=False, labels=labels, fused_lm_head=True)
        shift_mask = mask[:, 1:]
        # Prompt-learning adapters put virtual tokens in front
        per_token_logps = outputs.log_probs[:, -shift_mask.size(1) :]
        if self.ld_alpha is None:
            logps = per_token_logps.sum(dim=1)
        else:
            position = shift_mask.cumsum(dim=1)
            shared = torch.minimum(*shift_mask.sum(dim=1).chunk(2)).repeat(2).unsqueeze(1)
            common = (per_token_logps * ((position > 0) & (position <= shared))).sum(dim=1)
            logps = common + self.ld_alpha * (per_token_logps * (position > shared)).sum(dim=1)
        return PairScores(*logps.chunk(2), outputs, shift_mask)

    # stands on DPOTrainer.compute_ref_log_probs, which the precompute pass and users call
    def compute_ref_log_probs(self, model, inputs) -> tuple[Tensor, Tensor]:
        """The reference's summed log-probabilities of one padded batch: chosen (B,), rejected (B,), in nats."""
        reference = self.ref_model if self.ref_model is not None else model
        adapter = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            peft_model = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(peft_model, "ref" if "ref" in peft_model.peft_config else None)
        with torch.no_grad(), self._plain_forward(), adapter, self.accelerator.autocast():
            scores = self.score(reference, inputs)
        return scores.chosen_logps, scores.rejected_logps

    def _plain_forward(self):
        """Recomputing activations has no use without gradient, and reentrant checkpointing warns."""
        if not self.args.gradient_checkpointing:
            return contextlib.nullcontext()
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def _reference_logps(self, model, inputs) -> tuple[Tensor, Tensor]:
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(model, inputs)

    # stands on DPOTrainer._precompute_ref_logps
    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        keep_4bit_weights_trainable(self.model)
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        return _reference.precompute(self, dataset, name, batch_size)

    # stands on Trainer.get_batch_samples: the whole accumulation window, before its first backward
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._watch_gradients()
        batches, items = super().get_batch_samples(
            _counting_rows(self.accelerator, epoch_iterator), num_batches, device
        )
        if batches:
            rows = count_rows(self.accelerator, sum(batch["real_rows"] for batch in batches))
            self.prepare_window(batches, Window(len(batches), self.accelerator.num_processes, rows))
        return batches, items

    def _watch_gradients(self) -> None:
        if self._live_gradients is None:
            watched = self.args.check_gradients and is_peft_model(self.model)
            self._live_gradients = LiveGradients(self.model) if watched else False
        elif self._live_gradients and self._live_gradients.after_step(self):
            self._live_gradients = False
        if self._live_gradients:
            self._live_gradients.before_step(self)

    def prepare_window(self, batches: list[dict], window: Window) -> None:
        """Give every pair of the step its coefficient c: a micro-batch of B pairs trains on `sum_i c_i loss_i / B`."""
        for batch in batches:
            batch["pair_coefficients"] = _real_pairs(batch) * window.undo(_pairs(batch))

    # stands on DPOTrainer._compute_loss
    def _compute_loss(self, model, inputs, return_outputs=False):
        mode = "train" if self.model.training else "eval"
        if "real_rows" not in inputs:
            inputs = {
                **inputs,
                "real_rows": real_rows(self.accelerator, _pairs(inputs)) if mode == "eval" else _pairs(inputs),
            }
        scores = self.score(model, inputs)
        ref_chosen_logps, ref_rejected_logps = self._reference_logps(model, inputs)
        chosen_logratios = scores.chosen_logps - ref_chosen_logps
        rejected_logratios = scores.rejected_logps - ref_rejected_logps
        self._check_first_margins(chosen_logratios, rejected_logratios, inputs)
        losses = self.pair_losses(chosen_logratios, rejected_logratios, inputs)
        loss = self.reduce_pairs(losses, inputs, mode)
        if mode == "train" and self.is_in_train:
            self._finite_loss.watch(self, loss)
        with torch.no_grad():
            self._record(mode, scores, chosen_logratios, rejected_logratios, losses, inputs)
        if return_outputs:
            kwargs = {key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_MODEL}
            with torch.no_grad():
                return loss, model(**kwargs, use_cache=False)
        return loss

    def reduce_pairs(self, losses: Tensor, inputs: dict, mode: str) -> Tensor:
        """The loss of a micro-batch: the mean over pairs, with the window's coefficients in training."""
        if mode == "train" and "pair_coefficients" in inputs:
            return (losses * inputs["pair_coefficients"]).mean()
        # A rank whose last batch only fills up has no row that counts; its value is cut off by the Trainer's gather
        return losses[: max(inputs["real_rows"], 1)].mean()

    def _check_first_margins(self, chosen_logratios: Tensor, rejected_logratios: Tensor, inputs: dict) -> None:
        if self._margin_checked or not self.model.training:
            return
        self._margin_checked = True
        if self._reference_is_given or not self.args.check_reference or self.state.global_step > 0:
            return
        tokens = inputs["completion_mask"].sum(dim=1).clamp(min=1)
        per_token = torch.cat([chosen_logratios, rejected_logratios]).detach().abs() / tokens
        worst = self.accelerator.gather(per_token.max().unsqueeze(0)).max().item()
        _checks.check_zero_margin(worst, self.model, self.accelerator, _reference.describe(self))

    def _record(self, mode, scores: PairScores, chosen_logratios, rejected_logratios, losses, inputs) -> None:
        means, real = self._means[mode], _real_pairs(inputs)
        chosen_rewards, rejected_rewards = self.beta * chosen_logratios, self.beta * rejected_logratios
        for name, values in (
            ("rewards/chosen", chosen_rewards),
            ("rewards/rejected", rejected_rewards),
            ("rewards/accuracies", (chosen_rewards > rejected_rewards).float()),
            ("rewards/margins", chosen_rewards - rejected_rewards),
            ("logps/chosen", scores.chosen_logps),
            ("logps/rejected", scores.rejected_logps),
        ):
            means.add(name, values, real)
        tokens = scores.shift_mask.bool() & real.repeat(2).unsqueeze(1)
        width, outputs = tokens.size(1), scores.outputs
        chosen_tokens, rejected_tokens = tokens.chunk(2)
        if outputs.entropy is not None:
            means.add("entropy", outputs.entropy[:, -width:], tokens)
        if outputs.mean_logits is not None:
            chosen_logits, rejected_logits = outputs.mean_logits[:, -width:].chunk(2)
            means.add("logits/chosen", chosen_logits, chosen_tokens)
            means.add("logits/rejected", rejected_logits, rejected_tokens)
        if outputs.is_top1 is not None:
            means.add("mean_token_accuracy", outputs.is_top1[:, -width:].chunk(2)[0].float(), chosen_tokens)
        if mode == "train":
            means.add_sum("num_tokens", (inputs["attention_mask"].sum(dim=1) * real.repeat(2)).sum().float(), 1)
        self.extra_metrics(means, losses, chosen_logratios - rejected_logratios, inputs, mode)

    # stands on DPOTrainer.log, which averages the lists in `_metrics`
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        sums = self._means[mode].reduce(self.accelerator)
        if "num_tokens" in sums:
            self._total_train_tokens += int(sums.pop("num_tokens")[0])
        metrics = {name: total / count if count else 0.0 for name, (total, count) in sums.items()}
        if metrics:
            metrics["num_tokens"] = self._total_train_tokens
            self.finish_metrics(metrics, mode)
        for name, value in metrics.items():
            self._metrics[mode][name] = [value]
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write `README.md` into the output folder: what was trained, on what, how, and how to load it."""
        if self.is_world_process_zero():
            write_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags)

    def pair_losses(self, chosen_logratios: Tensor, rejected_logratios: Tensor, inputs: dict) -> Tensor:
        """The loss of each pair, (B,) from log-ratios (B,) in nats."""
        raise NotImplementedError

    def extra_metrics(self, means: MeanMetrics, losses: Tensor, margins: Tensor, inputs: dict, mode: str) -> None:
        """Add a method's own metrics; `losses` and `margins` are (B,)."""

    def finish_metrics(self, metrics: dict[str, float], mode: str) -> None:
        """Change reduced metrics in place before they are logged."""


class _PairColumns:
    """A collator that also hands over the columns of ours that TRL's collator does not know."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collator(examples)
        if "flip_rate" in examples[0]:
            batch["flip_rate"] = torch.tensor([float(example["flip_rate"]) for example in examples])
        return batch


def _counting_rows(accelerator, batches):
    """Count the rows of each batch that are data at the moment it is drawn: the dataloader's state is of that batch."""
    for batch in batches:
        yield {**batch, "real_rows": real_rows(accelerator, _pairs(batch))}


def _is_shorter(ids: list[int], limit: int) -> bool:
    return len(ids) < limit


def _pairs(batch) -> int:
    return batch["input_ids"].size(0) // 2


def _real_pairs(batch) -> Tensor:
    return torch.arange(_pairs(batch), device=batch["input_ids"].device) < batch["real_rows"]
