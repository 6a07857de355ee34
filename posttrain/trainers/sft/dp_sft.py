"""Supervised fine-tuning with differential privacy: DP-SGD on a LoRA, for rows or for people."""

import torch
from torch import Tensor
from trl import SFTTrainer

from posttrain.compat import keep_4bit_weights_trainable
from posttrain.data.processing import tokenizer_of
from posttrain.errors import ConfigError
from posttrain.mechanisms.frozen_a import freeze_a
from posttrain.mechanisms.window import Window
from posttrain.privacy.paper import PAPER
from posttrain.run.head import TrueHead
from posttrain.run.private import PrivateRun
from posttrain.trainers.sft.dp_sft_config import DPSFTConfig
from posttrain.trainers.sft.mixin import InstructionMixin

__all__ = ["DPSFTConfig", "DPSFTTrainer"]

_TOKENS = ("input_ids", "attention_mask", "labels")


def row_losses(logps: Tensor, mask: Tensor) -> Tensor:
    """Return each row's mean negative log-likelihood over its own learned tokens, (B,) in nats; 0 without any.

    A row's loss depends on no other row, as a mean over the tokens of a batch would.

    Args:
        logps: (B, T) log-probabilities. mask: (B, T) bool, which of them are learned.
    """
    return -torch.where(mask, logps, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class DPSFTTrainer(InstructionMixin, SFTTrainer):
    """`trl.SFTTrainer` with differential privacy: whoever sees the weights learns little about any one row, or person.

    Takes what `trl.SFTTrainer` takes but for `formatting_func`, `compute_loss_func` and images, with a `DPSFTConfig` as
    `args`, and a LoRA. A row's loss is the mean over its own learned tokens. In each step every unit of privacy is
    drawn with the same probability, its gradient is clipped, the clipped ones are added up, and the sum gets Gaussian
    noise. Losses, norms and evaluations that are logged are computed from the rows without noise: they are not to be
    published.

    Raises:
        ConfigError, DataError: (ValueErrors) bad settings; columns or values that are missing or cannot be; what would
            couple rows. All before the model loads, but for what its modules alone tell.
        EnvironmentIssue: dp-accounting is missing (`pip install "posttrain[dp]"`).
        TypeError: `args` of another class.

    Source: arXiv 1607.00133, algorithm 1.
    """

    _config_class = DPSFTConfig
    _name = "SFT with differential privacy (DP-SGD)"
    _tag_names = ["trl", "posttrain", "dp_sft", "sft"]
    _not_private = "its private settings are fields of DPSFTConfig, given as args"
    _paper = PAPER

    def _by_name(self, rest: tuple, kwargs: dict) -> dict:
        given = super()._by_name(rest, kwargs)
        if given.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func is given, in the place of a loss of each row alone. Leave it out.")
        return given

    def _place(self, ready) -> None:
        super()._place(ready)
        # before the head is tried, which is a pass without gradient
        keep_4bit_weights_trainable(self.model)
        self._head = TrueHead(self)
        if not self.args.train_lora_a:
            freeze_a(self.model, self.args.seed)

    def _complete(self, ready) -> None:
        super()._complete(ready)
        token = tokenizer_of(self.processing_class).pad_token_id or 0
        blank = {"input_ids": [token, token], "labels": [-100, -100]}
        self._private = PrivateRun(self, blank, _made_up(self.model))

    def unit_losses(self, model, batch: dict) -> Tensor:
        """Return the loss of each row of a batch, (B,)."""
        outputs = self._forward(model, batch)
        return row_losses(outputs.log_probs, outputs.label_mask)

    def _forward(self, model, batch: dict):
        self._head.check(model)
        return model(**{name: batch[name] for name in _TOKENS}, use_cache=False, fused_lm_head=True)

    def prepare_window(self, batches: list[dict], window: Window) -> None:
        # tokens are counted with their rows
        pass

    # stands on SFTTrainer.compute_loss
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training and self.is_in_train:
            with self.policy_forward():
                outputs = self._forward(model, inputs)
        else:
            inputs = self.with_real_rows(inputs, "eval")
            outputs = self._forward(model, inputs)
        real = self.is_real(inputs)
        losses = row_losses(outputs.log_probs, outputs.label_mask)
        mode = "train" if self.model.training else "eval"
        with torch.no_grad():
            self._record(mode, outputs, inputs, losses, real)
        if mode == "train":
            return self.sum_of_rows(losses, real)
        loss = losses[: max(int(real.sum()), 1)].mean()
        if return_outputs:
            plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                return loss, model(**plain, use_cache=False)
        return loss

    def _record(self, mode: str, outputs, inputs: dict, losses: Tensor, real: Tensor) -> None:
        known = self.told_rows(real, losses)
        means, mask = self._means[mode], outputs.label_mask & known.unsqueeze(1)
        means.add("nll/row", losses, known)
        if outputs.entropy is not None:
            means.add("entropy", outputs.entropy, mask)
        if outputs.is_top1 is not None:
            means.add("mean_token_accuracy", outputs.is_top1.float(), mask)
        if mode == "train":
            tokens = inputs["attention_mask"].sum(dim=1)
            means.add_sum("num_tokens", (tokens * real).sum().float(), 1)


def _made_up(model) -> list[dict]:
    """Return two rows of made-up tokens, of unequal lengths."""
    size = model.config.get_text_config().vocab_size
    rows = [[(7 * place + 3) % size for place in range(6)], [(5 * place + 11) % size for place in range(9)]]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]
