"""What a run on scored answers needs before any weights are there: rows scored, checked, cut and weighed."""

import functools

from posttrain.data import rows
from posttrain.data.instructions.tokens import tokenised_before_loading
from posttrain.data.limits import Limits
from posttrain.data.processing import generation_stop_ids, processing_class_for
from posttrain.data.scored import answer_tokens, baselines, loading, scoring
from posttrain.errors import ConfigError
from posttrain.run import checks, evaluation
from posttrain.run.prepared import Prepared
from posttrain.trainers.offline import answer_rows, answer_scores


class Answers:
    """Scores, checks, cuts and weighs the rows of a run; a method's own class fills in the hooks.

    Args:
        args: the trainer's config.
        reward_func: scores answers that have no reward; None where they have one.

    Attributes:
        reward_columns: what a reward function was given beside prompt and answer, by prompt.
        lost: sentence about rows dropped by `max_length`, appended to error messages.
    """

    def __init__(self, args, reward_func=None) -> None:
        if reward_func is not None and getattr(args, "allow_code", None) is not None:
            scoring.check_reward(reward_func, args.allow_code)
        self.args, self.reward_func = args, reward_func
        self.reward_columns: dict[str, dict] = {}
        self.lost = ""

    @property
    def needs_rewards(self) -> bool:
        """Return whether rows need a reward."""
        return self.args.weighs_by is not None

    @property
    def has_head(self) -> bool:
        """Return whether the values of prompts are learned by a value head."""
        return False

    @property
    def weighed_late(self) -> bool:
        """Return whether `weigh` has to wait for the model, and gets tokenised rows."""
        return not tokenised_before_loading(self.args)

    def kept_columns(self) -> dict[str, str]:
        """Return the columns of the rows that `weigh` reads beside prompt, completion and reward: theirs to ours."""
        return {}

    def check_rows(self, dataset, name: str) -> None:
        """Refuse rows that the method cannot take."""

    def check_left(self, dataset) -> None:
        """Refuse training rows from which nothing can be learned, of those that `max_length` leaves."""

    def weigh(self, dataset, name: str, trainer=None):
        """Add the column `weight`, each answer's factor on its gradient, and `advantage` where there is one.

        `trainer`: where the values of prompts come from its model.
        """
        raise NotImplementedError

    def prepare(
        self, model, config, processing_class, train_dataset, eval_dataset, same_scale: bool = False, score: bool = True
    ) -> Prepared:
        """Check settings and answers as far as that needs no weights; cut them to `max_length`, and weigh them.

        Args:
            model: its name, or the model itself. config: the model's.
            processing_class: a tokenizer or processor, or None for the model's own.
            train_dataset: scored answers. eval_dataset: likewise, several by name, or None.
            same_scale: data sets are on one scale of rewards, whatever they look like.
            score: False leaves out what needs rewards that the reward function would have to give.

        Raises:
            ConfigError, DataError, EnvironmentIssue: settings, rows or a tokenizer that cannot be trained with.
        """
        args = self.args
        checks.check_model_config(args, config)
        evaluation.check_sets(args, eval_dataset)
        answer_rows.check_stream(args, train_dataset)
        tokenizer = processing_class_for(model, processing_class, args)
        revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
        stop_ids = generation_stop_ids(model, revision)
        scored = score and self.needs_rewards
        train_dataset = self.scored(train_dataset, "train_dataset", scored)
        named = {name: self.scored(given, name, scored) for name, given in rows.by_name(eval_dataset).items()}
        limits, facts = Limits(model, config), {"answers": len(train_dataset)}
        if scored and self.reward_func is None and not same_scale:
            answer_rows.check_scales(train_dataset, named)
        if tokenised_before_loading(args):
            train_dataset, self.lost = answer_tokens.drop_overlong(
                train_dataset, tokenizer, args, "train_dataset", stop_ids
            )
            named = {
                n: answer_tokens.drop_overlong(dataset, tokenizer, args, n, stop_ids)[0] for n, dataset in named.items()
            }
            for name, dataset in {"train_dataset": train_dataset, **named}.items():
                limits.check_answers(dataset, tokenizer, args, name)
            facts["within_max_length"] = len(train_dataset)
        if score:
            self.check_left(train_dataset)
        if scored:
            facts["rewards"] = train_dataset["reward"][:]
        if score and not self.weighed_late:
            weighed = self.weigh(train_dataset, "train_dataset")
            if "advantage" in weighed.column_names:
                facts["advantages"] = weighed["advantage"][:]
            train_dataset = answer_rows.with_gradient(weighed, args)
            named = {name: self.weigh(dataset, name) for name, dataset in named.items()}
        known = score and not self.weighed_late
        return Prepared(
            train_dataset, rows.as_given(eval_dataset, named), limits, len(train_dataset) if known else None, facts
        )

    def scored(self, dataset, name: str, needs_rewards: bool | None = None):
        """Return a data set with a reward for each answer, in columns of our names, checked.

        `needs_rewards`: by default what the method needs.
        """
        if dataset is None:
            raise ConfigError(f"{name} is missing; give a datasets.Dataset of prompt, completion and reward.")
        needs_rewards = self.needs_rewards if needs_rewards is None else needs_rewards
        scorer, columns = None, self.kept_columns()
        if self.reward_func is not None and needs_rewards:
            scorer = functools.partial(self.score, name=name)
        dataset = loading.as_scored(dataset, name, tuple(columns), needs_rewards, scorer).rename_columns(columns)
        if needs_rewards or not self.needs_rewards:
            self.check_rows(dataset, name)
        return dataset

    def score(self, rows: list[dict], name: str) -> list[float]:
        """Return the reward function's scores of rows of prompt, completion and what it reads beside them."""
        for row in rows:
            others = {column: value for column, value in row.items() if column not in ("prompt", "completion")}
            self.reward_columns.setdefault(baselines.prompt_key(row["prompt"]), others)
        return answer_scores.score(rows, self.reward_func, name, self.args)
