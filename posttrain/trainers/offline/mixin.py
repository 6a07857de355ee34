"""The mixin of offline trainers: weighed answers on TRL's SFTTrainer, the mean over sequences of the whole step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from posttrain.compat import keep_4bit_weights_trainable
from posttrain.data import processing, rows
from posttrain.data.instructions.tokens import tokenised_before_loading
from posttrain.data.limits import Limits
from posttrain.data.scored import answer_tokens
from posttrain.mechanisms.dropout import drops_out
from posttrain.mechanisms.weighted_sampler import WeightedSampler
from posttrain.run import new_tokens
from posttrain.run.checks import evaluating
from posttrain.run.head import TrueHead
from posttrain.run.reference import end_engine, gap_at_start, starts_as_identity
from posttrain.run.sharing import PrefixSharing
from posttrain.trainers.offline import answer_rows, reference_logps
from posttrain.trainers.offline.prepare import Answers
from posttrain.trainers.sft.mixin import SFTMixin


class OfflineMixin(SFTMixin):
    """Trains on logged answers, in three seams: `Answers`, `sequence_losses`, `extra_metrics`.

    Before training, in this order: rows are checked and scored, those of which `max_length` leaves no answer are left
    out, `Answers.weigh` gives each its weight on the gradient, rows of weight 0 are dropped, and the starting model's
    log-probabilities of the others are computed where the loss reads them. The mean over sequences is taken over the
    optimiser step's global batch, whatever its split.
    """

    extra_columns = {"reward": "rewards", "advantage": "advantages"}
    _answers_class: type[Answers]
    _not_private = (
        "which answers are trained on, and with what weight, follows from other rows as well: from the mean of their "
        "rewards, from what a head learned of them, or from their number, so no row's part in a step is bounded"
    )

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *rest,
        reward_func=None,
        same_scale=False,
        **kwargs,
    ):
        kwargs = self._by_name(rest, kwargs)
        answer_rows.refuse(model, kwargs.get("peft_config"), kwargs)

        def ready(model, args, config):
            self.answers = self._answers_class(args, reward_func)
            return self.answers.prepare(model, config, processing_class, train_dataset, eval_dataset, same_scale)

        kwargs |= dict(data_collator=data_collator, processing_class=processing_class)
        self._build(model, args, kwargs, ready, super().__init__)

    def _begin(self, ready) -> None:
        self.given_rows = ready.facts["answers"]
        self._begin_window()
        self.adapter_is_new = self._peft_config is not None and starts_as_identity(self._peft_config)
        self.reference_key, self.reference_engine = None, None
        self._start_checked, self._sharing = False, None

    def _place(self, ready) -> None:
        keep_4bit_weights_trainable(self.model)
        self._head, self._sharing = TrueHead(self), PrefixSharing(self)
        self.data_collator = answer_rows.AnswerColumns(self.data_collator, self.extra_columns)
        named = rows.by_name(self.eval_dataset)
        new_tokens.warn_of_frozen(self.model, self.train_dataset, ("input_ids",), self.processing_class)
        new_tokens.warn_of_absent(self.model, self.train_dataset, ("input_ids",), self.processing_class)
        if not tokenised_before_loading(self.args):
            limits = Limits(self.model, self.model.config)
            for name, dataset in {"train_dataset": self.train_dataset, **named}.items():
                limits.check_answers(dataset, self.processing_class, self.args, name)
        if self.answers.weighed_late:
            answer_rows.check_rows_left(self.train_dataset, self.args)
            weighed = self.answers.weigh(self.train_dataset, "train_dataset", self)
            self.train_dataset = answer_rows.with_gradient(weighed, self.args)
            self.eval_dataset = rows.as_given(
                self.eval_dataset, {name: self.answers.weigh(dataset, name, self) for name, dataset in named.items()}
            )

    def _complete(self, ready) -> None:
        self.train_dataset = self._with_reference(self.train_dataset, "train_dataset")
        named = rows.by_name(self.eval_dataset)
        self.eval_dataset = rows.as_given(
            self.eval_dataset, {name: self._with_reference(dataset, name) for name, dataset in named.items()}
        )
        end_engine(self)

    @property
    def has_trained(self) -> bool:
        """Return whether the weights may have left their start."""
        return self.state.global_step > 0

    def _with_reference(self, dataset, name: str):
        if not self.args.needs_reference:
            return dataset
        return reference_logps.precompute(self, dataset, name, self.args.per_device_eval_batch_size)

    # stands on SFTTrainer._set_signature_columns_if_needed
    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for name in (*self.extra_columns, reference_logps.COLUMN):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    # stands on Trainer._get_train_sampler
    def _get_train_sampler(self, train_dataset=None):
        if self.args.drawn_by is None:
            return super()._get_train_sampler(train_dataset)
        weights = self.train_dataset["weight"][:]
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        # the state's epoch is a whole number where one begins, and within one after a resumption
        return WeightedSampler(weights, len(weights), seed, lambda: int((self.state.epoch or 0) + 1e-6))

    def check_first(self, logps: Tensor, mask: Tensor, inputs: dict) -> None:
        """Check before the first step that all importance ratios are 1, so that the reference is the policy's start."""
        if self._start_checked or not self.model.training:
            return
        self._start_checked = True
        reference = inputs.get("ref_per_token_logps")
        if reference is None or not self.args.check_reference or self.has_trained or drops_out(self.model):
            return
        with torch.no_grad():
            if self.weights_have_noise:
                with evaluating(self.model_wrapped), self.plain_forward():
                    logps, mask = self.score(self.model_wrapped, inputs)
            differences = torch.where(mask, logps - reference, 0.0).sum(dim=1)
            gap = gap_at_start(self, differences, mask.sum(dim=1))
        reference_logps.check_policy_is_reference(self, gap)

    # stands on SFTTrainer.evaluate
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate as `trl.SFTTrainer.evaluate` does; a data set given here is scored, weighed and tokenised first."""
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._prepared(dataset, name) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, "eval_dataset")
        end_engine(self)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _prepared(self, dataset, name: str):
        if "input_ids" in (getattr(dataset, "column_names", None) or ()):
            return dataset
        args = self.args
        dataset = self.answers.scored(dataset, name)
        if tokenised_before_loading(args):
            stop_ids = processing.generation_stop_ids(self.model)
            dataset, _ = answer_tokens.drop_overlong(dataset, self.processing_class, args, name, stop_ids)
            Limits(self.model, self.model.config).check_answers(dataset, self.processing_class, args, name)
        if not self.answers.weighed_late:
            dataset = self.answers.weigh(dataset, name)
        dataset = self._prepare_dataset(dataset, self.processing_class, args, False, None, name)
        if self.answers.weighed_late:
            dataset = self.answers.weigh(dataset, name, self)
        return self._with_reference(dataset, name)
