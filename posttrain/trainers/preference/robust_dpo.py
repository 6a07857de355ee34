"""DPO for preference labels of which some are wrong: rDPO, Dr. DPO and their baselines in one trainer."""

import math

import torch
from torch import Tensor
from trl import DPOTrainer

from posttrain.errors import DivergedError
from posttrain.log import get_logger
from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.mechanisms.row_groups import CHOSEN, REJECTED
from posttrain.mechanisms.window import Window, gather_rows
from posttrain.objectives import preference
from posttrain.trainers.preference.mixin import PreferenceMixin
from posttrain.trainers.preference.private import private_run, private_settings_of
from posttrain.trainers.preference.robust_dpo_config import NEEDS_FLIP_RATE, RobustDPOConfig


class RobustDPOTrainer(PreferenceMixin, DPOTrainer):
    """Trains `trl.DPOTrainer` on noisy labels: rDPO (arXiv 2403.00409), Dr. DPO (arXiv 2407.07880), cDPO, hinge, IPO.

    Takes what `trl.DPOTrainer` takes, with a `RobustDPOConfig` as `args`. The loss is a mean, or Dr. DPO's soft
    minimum, over the pairs of the optimiser step's global batch: it does not depend on micro-batches, ranks or padding.
    With `flip_rate: 0`, or `beta_prime: .inf`, it is TRL's DPO bit for bit (on full windows).

    Args (by name, beside TRL's):
        privacy: a `PrivacyConfig`, which makes the run differentially private for each pair, or a person's pairs.

    Raises:
        ConfigError, DataError: (ValueErrors) missing columns, a model with attention dropout or an auxiliary loss, a
            reference that is not the policy's start; all but the last before the model loads.
        TypeError: `args` of another class.
    """

    _config_class = RobustDPOConfig
    _name = "Robust DPO"
    _tag_names = ["trl", "posttrain", "robust_dpo", "dpo"]
    _papers = {
        "rdpo": {
            "title": "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
            "id": "2403.00409",
            "citation": """@inproceedings{chowdhury2024provably,
    title     = {{Provably Robust DPO: Aligning Language Models with Noisy Feedback}},
    author    = {Sayak Ray Chowdhury and Anush Kini and Nagarajan Natarajan},
    year      = 2024,
    eprint    = {arXiv:2403.00409},
}""",
        },
        "dr_dpo": {
            "title": "Towards Robust Alignment of Language Models: "
            "Distributionally Robustifying Direct Preference Optimization",
            "id": "2407.07880",
            "citation": """@article{wu2024towards,
    title     = {{Towards Robust Alignment of Language Models:
                  Distributionally Robustifying Direct Preference Optimization}},
    author    = {Junkang Wu and Yuexiang Xie and Zhengyi Yang and Jiancan Wu and Jiawei Chen and Jinyang Gao
                 and Bolin Ding and Xiang Wang and Xiangnan He},
    year      = 2024,
    eprint    = {arXiv:2407.07880},
}""",
        },
    }

    def __init__(self, *args, privacy=None, **kwargs):
        self.privacy = privacy
        super().__init__(*args, **kwargs)
        method = "dr_dpo" if self.args.reduction == "dr_dpo" else self.args.pair_loss
        self._paper = self._papers.get(method, DPOTrainer._paper)
        self._objective, self._unscored = None, None
        self._few_pairs_logs = 0

    def _check_settings(self, model, args, peft_config):
        # settings that were made private stay so
        self.privacy = self.privacy if self.privacy is not None else getattr(args, "privacy", None)
        if self.privacy is not None:
            args = private_settings_of(args, self.privacy)
        return super()._check_settings(model, args, peft_config)

    def _complete(self, ready) -> None:
        super()._complete(ready)
        if self.privacy is not None:
            self._private = private_run(self)

    def unit_losses(self, model, batch: dict) -> Tensor:
        """Return the loss of each pair of a batch, (B,)."""
        scores, reference = self.score(model, batch), self.compute_ref_log_probs(model, batch)
        return self.pair_losses(scores.chosen_logps - reference[0], scores.rejected_logps - reference[1], batch)

    @property
    def _rescales(self) -> bool:
        args = self.args
        return self.args.weighs_pairs and args.dr_dpo_scope == "global" and args.dr_dpo_window == "rescale"

    @property
    def split_matters(self) -> bool:
        return super().split_matters or (self.args.weighs_pairs and self.args.dr_dpo_scope == "micro_batch")

    def pair_losses(self, chosen_logratios: Tensor, rejected_logratios: Tensor, inputs: dict) -> Tensor:
        groups, ipo = self.groups_of(inputs), self.args.pair_loss == "ipo"
        if ipo:
            chosen_tokens, rejected_tokens = groups.split(inputs["completion_mask"].sum(dim=1).clamp(min=1.0))
            chosen_logratios = chosen_logratios / chosen_tokens
            rejected_logratios = rejected_logratios / rejected_tokens
        margins = groups.mean(chosen_logratios, CHOSEN) - groups.mean(rejected_logratios, REJECTED)
        if ipo:
            return preference.ipo(margins, self.beta)
        z = self.beta * margins
        if self.args.pair_loss in NEEDS_FLIP_RATE:
            loss = preference.rdpo if self.args.pair_loss == "rdpo" else preference.cdpo
            return loss(z, inputs.get("flip_rate", self.args.flip_rate))
        return (preference.dpo if self.args.pair_loss == "dpo" else preference.hinge)(z)

    def prepare_window(self, batches: list[dict], window: Window) -> None:
        if self._private is not None:
            # a pair's weight is that of its unit
            return
        super().prepare_window(batches, window)
        if not self.args.weighs_pairs or self.args.dr_dpo_scope == "micro_batch":
            return
        self._window = window
        if self._rescales:
            self._unscaled_weights = []
        elif window.micro_batches > 1:
            self._unscored = batches

    def _weigh_window(self, batches: list[dict]) -> None:
        weights = self._global_weights(self._score_window(batches), batches)
        for batch, part in zip(batches, weights.split([self.rows_in(batch) for batch in batches]), strict=True):
            batch["pair_weights"] = part

    def _global_weights(self, losses: Tensor, batches: list[dict]) -> Tensor:
        """Return Dr. DPO's weights (R,) of this rank's rows among all rows of the step, 0 for repeats that fill up.

        `losses`: (R,) of the micro-batches in `batches`. Notes the step's objective, and its metrics, on the way.
        """
        repeats = any(batch["real_rows"] < self.rows_in(batch) for batch in batches)
        real = torch.cat([self.is_real(batch) for batch in batches]) if repeats else None
        all_losses, own = gather_rows(self.accelerator, losses.detach(), real)
        all_weights = preference.dr_dpo_weights(all_losses, self.args.beta_prime)
        self._objective = preference.dr_dpo(all_losses, self.args.beta_prime)
        self._record_weights(all_weights, self._window.rows)
        if real is None:
            return all_weights[own].to(losses.dtype)
        weights = torch.zeros_like(losses)
        weights[real] = all_weights[own]
        return weights

    @torch.no_grad()
    def _score_window(self, batches: list[dict]) -> Tensor:
        """Compute the pair losses (R,) of this rank's micro-batches; leaves the reference log-probs in the batches.

        Dropout is drawn as the training pass will draw it again: weights are of the losses that are trained on.
        """
        self.model.train()
        devices = [self.accelerator.device] if self.accelerator.device.type != "cpu" else []
        if self._drops_out:
            with torch.random.fork_rng(devices=devices):
                return self._score_micro_batches(batches)
        return self._score_micro_batches(batches)

    def _score_micro_batches(self, batches: list[dict]) -> Tensor:
        losses = []
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager(), self.plain_forward():
                scores = self.score(self.model_wrapped, inputs)
                reference = self._reference_logps(self.model_wrapped, inputs)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = reference
            batch["reference_is_known"] = True
            if inputs.get("packed") is not None:
                batch["packed"] = inputs["packed"]
                batch["packed"].drop_masks()
            losses.append(
                self.pair_losses(scores.chosen_logps - reference[0], scores.rejected_logps - reference[1], inputs)
            )
        return torch.cat(losses)

    def reduce_pairs(self, losses: Tensor, inputs: dict, mode: str) -> Tensor:
        if mode == "train" and self._private is not None:
            return self.sum_of_rows(losses, self.is_real(inputs))
        if mode == "eval" or not self.args.weighs_pairs:
            return super().reduce_pairs(losses, inputs, mode)
        if "pair_coefficients" not in inputs or self.args.dr_dpo_scope == "micro_batch":
            return self._weigh_micro_batch(losses, inputs)
        if self._rescales:
            weights = torch.exp(-losses.detach() / self.args.beta_prime) * self.is_real(inputs)
            self._unscaled_weights.append(weights)
            # `training_step` divides the gradients by the sum of all weights once it is known
            return (weights * losses).sum()
        weights = inputs.get("pair_weights")
        if weights is None:
            # one micro-batch a step: every rank's losses are at hand, and no first pass was needed
            weights = self._global_weights(losses.detach(), [inputs])
        # undoes the Trainer's division by micro-batches and the mean over ranks
        surrogate = (weights * losses).sum() * (self._window.micro_batches * self._window.world_size)
        # The value shown is the objective, the gradient is the surrogate's
        return surrogate + (self._objective - surrogate).detach()

    def _weigh_micro_batch(self, losses: Tensor, inputs: dict) -> Tensor:
        real = inputs["real_rows"]
        if real == 0:
            return (losses * 0.0).sum()
        self._record_weights(preference.dr_dpo_weights(losses[:real], self.args.beta_prime), real)
        return preference.dr_dpo(losses[:real], self.args.beta_prime)

    # stands on DPOTrainer.training_step: gradients are reduced over ranks here, and not yet clipped
    def training_step(self, model, inputs, *args, **kwargs):
        if self._unscored is not None:
            # not as the window is drawn: upstream restores a resumed run's random state after that
            batches, self._unscored = self._unscored, None
            self._weigh_window(batches)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._rescales:
            return loss
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(loss)
        window, local = self._window, torch.cat(self._unscaled_weights)
        weights, _ = gather_rows(self.accelerator, local)
        total = weights.sum()
        if total == 0:
            raise DivergedError(
                f"every pair's loss exceeds about 100 x beta_prime ({self.args.beta_prime:g}), so all weights are 0 in "
                "fp32. Set `dr_dpo_window: two_pass`, which has no such limit, or a larger beta_prime."
            )
        # undoes the Trainer's division by micro-batches and the mean over ranks as well
        factor = window.micro_batches * window.world_size / total
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.device))
        self._record_weights(weights / total, window.rows)
        return (-self.args.beta_prime * (total.log() - math.log(window.rows))).to(loss.dtype)

    def _record_weights(self, weights: Tensor, pairs: int) -> None:
        means = self._means["train"]
        means.add("drdpo/batch_pairs", weights.new_full((1,), pairs))
        means.add("drdpo/effective_pairs", weights.square().sum().reciprocal().unsqueeze(0))
        means.add("drdpo/weight_max", weights.max().unsqueeze(0))

    def extra_metrics(self, means: MeanMetrics, losses: Tensor, margins: Tensor, inputs: dict, mode: str) -> None:
        real = self.told_rows(self.is_real(inputs), losses)
        if self.args.pair_loss in NEEDS_FLIP_RATE:
            means.add(f"{self.args.pair_loss}/dpo_loss", preference.dpo(self.beta * margins), real)
        if self.args.pair_loss == "rdpo":
            # checking a tensor of rates waits for the device, so a single rate stays a number
            kappa = preference.rdpo_kappa(inputs.get("flip_rate", self.args.flip_rate))
            kappa = kappa if isinstance(kappa, Tensor) else torch.full((), kappa, device=margins.device)
            means.add("rdpo/kappa", kappa.expand_as(margins), real)
            means.add("rdpo/negative_loss_fraction", (losses < 0).float(), real)
        if self.args.weighs_pairs:
            means.add("drdpo/dpo_loss", losses, real)
            if mode == "eval":
                # exp-means add up over batches, so the objective is of the whole evaluation set, however it is split
                means.add("drdpo/objective", torch.exp(-losses.double() / self.args.beta_prime), real)

    def finish_metrics(self, metrics: dict[str, float], mode: str) -> None:
        if "drdpo/objective" in metrics:
            mean = metrics["drdpo/objective"]
            metrics["drdpo/objective"] = -self.args.beta_prime * math.log(mean) if mean > 0 else math.inf
        if mode == "train" and "drdpo/effective_pairs" in metrics:
            self._watch_effective_pairs(metrics["drdpo/effective_pairs"], metrics["drdpo/batch_pairs"])

    def _watch_effective_pairs(self, effective: float, pairs: float) -> None:
        self._few_pairs_logs = self._few_pairs_logs + 1 if effective < 2 <= pairs else 0
        if self._few_pairs_logs == 10:
            get_logger().warning(
                "drdpo/effective_pairs was below 2 for 10 logs running: nearly all weight lies on one pair of each "
                "step. A larger beta_prime (now %g) or batch (now %g pairs) helps.",
                self.args.beta_prime,
                pairs,
            )
