"""Offline policy gradients from scored answers: the A-LoL family in one trainer."""

import math

import torch
from torch import Tensor
from trl import SFTTrainer

from posttrain.data.scored import baselines
from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.objectives import offline
from posttrain.trainers.offline import prompt_values
from posttrain.trainers.offline.a_lol_answers import ALoLAnswers
from posttrain.trainers.offline.a_lol_config import ALoLConfig
from posttrain.trainers.offline.mixin import OfflineMixin

_NAMES = {
    "nll": "SFT on scored answers",
    "wbc": "weighted behaviour cloning",
    "r_gold": "Reward GOLD",
    "r_lol": "R-LoL",
    "a_lol": "A-LoL",
    "a_lol_seq": "A-LoL seq",
    "a_lol_ref_free": "A-LoL ref-free",
    "a_lol_kl": "A-LoL KL",
}


class ALoLTrainer(OfflineMixin, SFTTrainer):
    """Trains `trl.SFTTrainer` on scored answers: A-LoL (arXiv 2305.14718) and the methods it is compared with.

    Takes what `trl.SFTTrainer` takes, with an `ALoLConfig` as `args`. Data sets have the columns prompt, completion and
    reward, as texts or as lists of messages, or are pairs with a reward for each side. The loss is the mean over the
    sequences of the optimiser step's global batch: it does not depend on micro-batches, ranks or padding. Where all
    answers have equally many tokens, `variant: nll` is `trl.SFTTrainer` at a learning rate times that number; in
    general SFTTrainer divides a step by its tokens, this trainer by its answers.

    Args:
        reward_func: a name or function as `posttrain.rewards.get_rewards` takes; scores every answer once, before
            training, instead of a column of rewards. Scores are cached by the answer and the function's code.
        same_scale: rewards for training and evaluation are on one scale, whatever they look like.

    Raises:
        ConfigError, DataError: (ValueErrors) bad settings; columns or rewards that are missing or cannot be, or whose
            scale in evaluation is another; no answer that fits `max_length` and beats its value; a model with
            attention dropout. All before the model loads, but for values of `value: head`.
        TypeError: `args` of another class.
    """

    _config_class = ALoLConfig
    _name = "A-LoL"
    _tag_names = ["trl", "posttrain", "a_lol", "sft"]
    _paper = {
        "title": "Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models",
        "id": "2305.14718",
        "citation": """@inproceedings{baheti2024leftover,
    title     = {{Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models}},
    author    = {Ashutosh Baheti and Ximing Lu and Faeze Brahman and Ronan Le Bras and Maarten Sap and Mark Riedl},
    booktitle = {International Conference on Learning Representations},
    year      = 2024,
    eprint    = {arXiv:2305.14718},
}""",
    }

    _answers_class = ALoLAnswers

    def __init__(self, *args, **kwargs):
        self._mean_weight: float | None = None
        self.value_heads: list | None = None
        self.value_head_key: str | None = None
        super().__init__(*args, **kwargs)
        # what the card says was run
        self._name = _NAMES[self.args.variant]

    @property
    def advantages(self) -> baselines.Advantages | None:
        """Summarise the training rows' advantages; None where a variant has none."""
        return self.answers.advantages

    def save_beside(self, folder, in_checkpoint: bool) -> None:
        """Write the value head beside the adapter or model; checkpoints find it in the run."""
        if not in_checkpoint:
            prompt_values.save_heads(self, folder)

    def computed_columns(self) -> set[str]:
        return {"advantage"} if self.args.value == "head" else set()

    def sequence_losses(self, logps: Tensor, mask: Tensor, inputs: dict) -> Tensor:
        args, weights = self.args, {}
        if args.weighs_by is not None:
            weights[args.weighs_by] = inputs[args.weighs_by]
            if args.advantage_weighting == "sample" and self.model.training:
                # rows are drawn by weight: with the mean as each one's, the step's gradient is that of `weight` in
                # expectation
                weights[args.weighs_by] = torch.full_like(inputs[args.weighs_by], self._mean_drawn_weight())
        return offline.a_lol(
            logps,
            inputs.get("ref_per_token_logps"),
            mask,
            variant=args.variant,
            clip=args.clip,
            kl_beta=args.kl_beta,
            keep_negative=args.keep_negative_advantages,
            **weights,
        )

    def _mean_drawn_weight(self) -> float:
        if self._mean_weight is None:
            weights = self.train_dataset["weight"][:]
            self._mean_weight = math.fsum(weights) / len(weights)
        return self._mean_weight

    def extra_metrics(self, means: MeanMetrics, logps: Tensor, mask: Tensor, inputs: dict, real: Tensor) -> None:
        if "rewards" in inputs:
            means.add("rewards/mean", inputs["rewards"], real)
        if "advantages" in inputs:
            means.add("advantages/mean", inputs["advantages"], real)
            means.add("advantages/positive_share", (inputs["advantages"] > 0).float(), real)
        if not self.args.needs_reference:
            return
        log_ratio = torch.where(mask, logps.detach() - inputs["ref_per_token_logps"], 0.0)
        if self.args.variant == "a_lol_seq":
            ratio, counted = log_ratio.exp(), mask & real.unsqueeze(1)
        else:
            ratio, counted = log_ratio.sum(dim=1).exp(), real
        means.add("ratio/mean", ratio, counted)
        means.add("ratio/clipped_share", (offline.clamp_ratio(ratio, self.args.clip) != ratio).float(), counted)
