"""The mixin of the policy gradient trainers: advantages, demonstrations, rows of zero advantage, rollout health."""

import contextlib
import functools
from collections.abc import Callable

import torch
import xxhash
from torch import Tensor

from posttrain.errors import DivergedError
from posttrain.log import get_logger
from posttrain.mechanisms import group_rewards, special_tokens
from posttrain.mechanisms.dropout import drops_out
from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.objectives import advantages, policy_gradient
from posttrain.objectives.estimators import PRESETS
from posttrain.rewards.base import named_with_settings
from posttrain.run.checks import evaluating
from posttrain.run.head import TrueHead
from posttrain.run.mixin import RunMixin
from posttrain.run.reference import check_zero_margin, describe_reference, gap_at_start, may_be_identity
from posttrain.run.sharing import PrefixSharing
from posttrain.trainers.policy_gradient import (
    completion_log,
    demonstrations,
    prepare,
    reward_setup,
    rollout_log,
    row_templates,
)
from posttrain.trainers.policy_gradient.evaluation import RolloutEvaluation
from posttrain.trainers.policy_gradient.kept_rows import KeptRows
from posttrain.trainers.policy_gradient.resumption import SaveBetweenGenerations


class PolicyGradientMixin(RolloutEvaluation, KeptRows, RunMixin):
    """Trains `trl.GRPOTrainer` by any advantage of a group's rewards, with demonstrations beside rollouts.

    TRL generates, scores and computes the loss. The seams are the gathered rewards, the scored batch, the buffer of
    micro-batches and the per-token log-probs.
    """

    no_value = None
    generates_in_steps = True
    _not_private = (
        "a rollout's advantage is by the others of its group, and what is generated follows from all tasks before, so "
        "no task's part in a step is bounded"
    )
    _train_sampler, _kept_tokens = None, None
    # for the next generation
    saves_may_wait = True

    def may_stop_here(self) -> bool:
        """Return whether no rollouts are under way."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *rest,
        **kwargs,
    ):
        kwargs = self._by_name(rest, kwargs) | dict(processing_class=processing_class)

        def ready(model, args, config):
            self._advantage_function = prepare.advantage_function(args)
            sampling = args.sampling.items()
            self._drawn_with = ", ".join(f"{name} {value}" for name, value in sampling if value is not None)
            rewards = kwargs["reward_funcs"] = reward_setup.reward_functions(reward_funcs, args)
            reward_setup.check(args, rewards, kwargs.get("environment_factory") is not None)
            return prepare.prepare(model, args, config, processing_class, train_dataset, eval_dataset, kwargs, rewards)

        self._build(model, args, kwargs, ready, super().__init__)

    def _begin(self, ready) -> None:
        self._limits = ready.limits
        self._sharing, self._scored, self._rewards, self._head = None, None, None, None
        self._reference_is_given, self._reference_checked = False, False
        self._rows = None
        self._means = {"train": MeanMetrics(), "eval": MeanMetrics()}
        self._generations_without_gradient, self._skipped = 0, False

    def own_identity(self) -> dict:
        """Return the names of the reward functions, with digests of their settings, and of the chat template."""
        found = {"rewards": list(map(named_with_settings, self.reward_func_names, self.reward_funcs))}
        template = getattr(self.processing_class, "chat_template", None)
        # prompts become tokens while the run goes on
        return found | ({"chat_template": xxhash.xxh3_64(repr(template).encode()).hexdigest()} if template else {})

    def calibration_ids(self, rows):
        # an environment may own its prompts
        for row in (row for row in rows if row.get("prompt")):
            # TRL renders an environment's tools only once it has been reset
            factories, self.environment_factories = self.environment_factories, None
            try:
                with row_templates.of_rows(self, [row]):
                    ids, *_ = self._tokenize_prompts([row["prompt"]])
            finally:
                self.environment_factories = factories
            yield from ids

    def _place(self, ready) -> None:
        # with the names that environments have brought
        reward_setup.check_success_reward(self.args, self.reward_func_names)

    def _complete(self, ready) -> None:
        self._kept_tokens = special_tokens.KeptTokens(
            self._tokenizer, self.reward_funcs, self.eos_token_ids, self.args.kept_tokens
        )
        self.add_callback(SaveBetweenGenerations(self))
        self._head = TrueHead(self)
        self._sharing = PrefixSharing(self, left_padded=True)

    def _live_reference(self, args) -> bool:
        return prepare.has_live_reference(args)

    # stands on GRPOTrainer._get_train_sampler; its generator is moved on where a run resumes
    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    # stands on GRPOTrainer._calculate_rewards, whose result is the gathered matrix
    def _calculate_rewards(self, *args, **kwargs):
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        reward_setup.check_scores(self, self._rewards)
        return self._rewards

    # stands on GRPOTrainer._generate, which decodes completions without special tokens
    def _generate(self, prompts):
        # upstream switches recomputation off for itself, and leaves a hook each time that it switches it on
        with self.plain_forward():
            generated = super()._generate(prompts)
        _, ids, _, completions, *_ = generated
        in_turns = not isinstance(completions[0], str)
        if not (in_turns and (self.tools or special_tokens.parses_messages(self._tokenizer))):
            self._kept_tokens.write(completions, ids)
        return generated

    # stands on GRPOTrainer._generate_and_score_completions
    def _generate_and_score_completions(self, inputs):
        with row_templates.of_rows(self, inputs), self.plain_forward():
            batch = super()._generate_and_score_completions(inputs)
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        rewards = group_rewards.weighted_rewards(self._rewards, self.reward_weights)
        mode = "train" if training else "eval"
        rollout_log.record(self, rewards, size, mode)
        # beside them in the table of completions
        self._logs["extra"]["sampling"].extend([self._drawn_with] * len(rewards))
        if self._advantage_function is not None:
            name = f"advantage {self.args.advantage}"
            values = group_rewards.group_advantages(rewards, size, self._advantage_function, name)
            self.set_advantages(batch, values)
            if self.args.quantile is not None:
                rollout_log.record_quantile(self, rewards.view(-1, size), values, mode)
        if training and self.args.learns_from_demonstrations:
            demonstrations.insert(self, batch, inputs, rewards, size)
            if self.log_completions:
                completion_log.show_demonstrations(self, batch)
        if training:
            self._watch_generations_without_gradient(batch, rewards)
        return batch

    # stands on GRPOTrainer._tokenize_prompts, which renders all prompts with the same tools and settings
    def _tokenize_prompts(self, prompts):
        if self._rows is None or len(self._rows) != len(prompts):
            return super()._tokenize_prompts(prompts)
        return row_templates.tokenise(self, prompts, super()._tokenize_prompts)

    def score_rollouts(self, rows: list[dict]) -> Tensor:
        """Answer and score `rows`, one rollout each, as TRL does; returns the rewards (N, F) of all ranks."""
        with row_templates.of_rows(self, rows), self.plain_forward():
            super()._generate_and_score_completions(rows)
        return self._rewards

    def group_advantage(self, rewards: Tensor) -> Tensor:
        """Return the advantages (P, G) of a group's rewards (P, G), as the settings ask for them."""
        if self._advantage_function is not None:
            return self._advantage_function(rewards)
        return advantages.group_mean_advantage(rewards, scale=self.scale_rewards)

    def set_advantages(self, batch: dict, values: Tensor) -> None:
        """Put (N,) gathered advantages into this rank's batch and into the log of completions."""
        own = len(batch["advantages"])
        start = self.accelerator.process_index * own
        batch["advantages"] = values[start : start + own].to(batch["advantages"].dtype)
        log = self._logs["advantages"]
        for _ in range(min(len(log), len(values))):
            log.pop()
        log.extend(values.tolist())

    def _watch_generations_without_gradient(self, batch: dict, rewards: Tensor) -> None:
        kept = self.accelerator.gather(group_rewards.rows_with_gradient(batch).float())
        self._metrics["train"]["rows/kept_share"].append(kept.mean().item())
        # the loss itself is near 0 while the policy is the one that sampled, however much there is to learn
        sizes = self.accelerator.gather(batch["advantages"].abs())
        self._metrics["train"]["loss/abs_advantage"].append(sizes.mean().item())
        self._generations_without_gradient = 0 if kept.any() else self._generations_without_gradient + 1
        limit = self.args.max_steps_without_gradient
        if limit and self._learns_from_advantages_alone and self._generations_without_gradient >= limit:
            scored = rewards[~torch.isnan(rewards)]
            last = f"last between {scored.min().item():g} and {scored.max().item():g}" if len(scored) else "no score"
            raise DivergedError(
                f"no rollout of the last {self._generations_without_gradient} generations had a gradient: all rewards "
                f"of a prompt were equal, or None ({last}). Easier prompts, a reward with more levels, more rollouts "
                "or a higher temperature help; completions/clipped_ratio near 1 says that max_completion_length is too "
                "short. `max_steps_without_gradient: 0` goes on all the same."
            )

    # stands on GRPOTrainer._compute_loss
    def _compute_loss(self, model, inputs):
        # a copy: what the log-probs decide is written into it before TRL reads it
        self._scored = scored = dict(inputs)
        try:
            loss = super()._compute_loss(model, scored)
        finally:
            self._scored = None
        if self.model.training and self._leaves_out_rows:
            rollout_log.take_means(self, scored)
        if self.model.training and self.is_in_train:
            self._finite_loss.watch(self, loss)
        return loss

    # stands on GRPOTrainer._get_per_token_logps_and_entropies, the one way to log-probs of every pass
    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._head is not None:
            self._head.check(model)
        if self._sharing is not None and self._sharing.active:
            self._sharing.check(model)
        # the check may have given it up
        if self._sharing is not None and self._sharing.active:
            model = _Sharing(self._sharing, model)
        # of all passes, the loss's own
        with self.policy_forward() if self._scored is not None else contextlib.nullcontext():
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._scored is not None:
            self._check_first_kl(self._scored, functools.partial(self._clean_logps, result, model, *args, **kwargs))
            if self.args.weighs_tokens:
                self._weigh_tokens(self._scored, result[0].detach())
            if "demonstrations" in self._scored:
                self._weigh_demonstrations(self._scored, result[0].detach())
        return result

    def _clean_logps(self, result, model, *args, **kwargs) -> Tensor:
        if not self.weights_have_noise:
            return result[0].detach()
        with torch.no_grad(), evaluating(self.model), self.plain_forward():
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)[0]

    def _check_first_kl(self, inputs: dict, logps: Callable[[], Tensor]) -> None:
        """Check before the first step that the policy is its reference."""
        if self._reference_checked or not self.model.training:
            return
        self._reference_checked = True
        reference = inputs.get("ref_per_token_logps")
        if reference is None or not self.args.check_reference or self.state.global_step > 0:
            return
        if drops_out(self.model) or not may_be_identity(self.model):
            return
        mask = inputs["completion_mask"]
        gap = gap_at_start(self, ((logps() - reference) * mask).sum(dim=1), mask.sum(dim=1))
        check_zero_margin(gap, self.model, self.accelerator, describe_reference(self))

    def _weigh_tokens(self, inputs: dict, logps: Tensor) -> None:
        """Weigh tokens on an unclipped loss of ratio 1, for the parts that TRL's loss has no setting for."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        weights = policy_gradient.gradient_weight(
            logps, inputs.get("old_per_token_logps"), mask, inputs["advantages"], self.args.parts
        )
        inputs["old_per_token_logps"] = logps
        inputs["advantages"] = inputs["advantages"][:, None] * weights

    def _weigh_demonstrations(self, inputs: dict, logps: Tensor) -> None:
        """Give demonstration rows the ratio 1, and each of their tokens its weight on the gradient of its log-prob."""
        rows = inputs["demonstrations"]
        if "old_per_token_logps" in inputs:
            inputs["old_per_token_logps"] = torch.where(rows[:, None], logps, inputs["old_per_token_logps"])
        if "ref_per_token_logps" in inputs:
            inputs["ref_per_token_logps"] = torch.where(rows[:, None], logps, inputs["ref_per_token_logps"])
        mask = inputs["completion_mask"] * rows[:, None]
        self._means["train"].add("hpt/sft_nll", -logps, mask.bool())
        if self.args.soft_gate is None:
            return
        share = inputs["off_policy_share"][:, None]
        parts = PRESETS["srft_offline" if self.args.demonstration_loss == "srft" else "luffy_offline"]
        values = inputs["advantages"]
        values = values[:, None] if values.dim() == 1 else values
        off_policy = policy_gradient.gradient_weight(logps, None, inputs["completion_mask"], values, parts)
        inputs["advantages"] = values * torch.where(rows[:, None], 1 - share + share * off_policy, 1.0)

    # stands on GRPOTrainer.log, which averages the lists in `_metrics`
    def log(self, logs, start_time=None):
        if self.model.training and self._leaves_out_rows:
            rollout_log.put_means(self)
        with completion_log.printed_as_text():
            super().log(logs, start_time)

    @property
    def step_moved(self) -> bool:
        return super().step_moved and not self._generations_without_gradient and not self._skipped

    def skips_step(self, model, norm) -> bool:
        limit = self.args.skip_grad_norm
        self._skipped = limit is not None and not norm <= limit
        if self._skipped:
            get_logger().warning("step %d skipped: gradient norm %.3g", self.state.global_step + 1, norm)
            for parameter in model.parameters():
                parameter.grad = None
        return self._skipped


class _Sharing:
    """Wraps the model so that each batch is packed."""

    def __init__(self, sharing: PrefixSharing, model) -> None:
        self._sharing, self._model = sharing, model

    def __call__(self, input_ids, attention_mask, labels, **kwargs):
        extras = sorted(kwargs.keys() - {"fused_lm_head"})
        if extras:
            self._sharing.decline(f"it holds {', '.join(extras)} for the model")
        else:
            packed = self._sharing.pack_rows(input_ids, attention_mask, labels)
            if packed is not None:
                kwargs["packed"] = packed
        return self._model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
