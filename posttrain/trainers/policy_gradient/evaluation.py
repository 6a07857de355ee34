"""How policy gradient trainers evaluate: rollouts as TRL samples them, and one greedy answer a prompt."""

from datasets import Dataset

from posttrain.data import columns
from posttrain.data.processing import tokenizer_of
from posttrain.data.tasks import task_rows
from posttrain.data.tokens import as_rendered
from posttrain.errors import ConfigError
from posttrain.rewards.base import check_missing_golds
from posttrain.trainers.policy_gradient import completion_log, rollout_log


class RolloutEvaluation:
    """Evaluates on tasks, which are checked as the constructor's are."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate as TRL does on sampled rollouts, and measure the success of one greedy answer a prompt.

        With several evaluation sets, as `transformers.Trainer.evaluate`, each gets its own.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._checked(eval_dataset)
        size, group = self.args.per_device_eval_batch_size * self.args.world_size, self.num_generations_eval
        if size % group:
            raise ConfigError(
                f"an evaluation batch holds {size} rollouts (per_device_eval_batch_size "
                f"{self.args.per_device_eval_batch_size}, {self.args.world_size} processes), which is no multiple of "
                f"the {group} drawn for a prompt. Change per_device_eval_batch_size or num_generations_eval."
            )
        with completion_log.of_evaluation(self, metric_key_prefix):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _checked(self, dataset):
        """Check a data set for evaluation as the constructor's are; returns it as the chat template will see it."""
        # of several by name, each comes here on its own
        if isinstance(dataset, dict) or not hasattr(dataset, "column_names"):
            return dataset
        check_missing_golds(self.reward_funcs, dataset, "eval_dataset")
        dataset = columns.prepare(dataset, "eval_dataset")
        tokenizer = tokenizer_of(self.processing_class)
        dataset = as_rendered(dataset, tokenizer, False, "eval_dataset")
        task_rows.check(dataset, tokenizer, self.args, "eval_dataset")
        self._limits.check_prompts(dataset, self.processing_class, self.args, "eval_dataset")
        return dataset

    def finish_evaluation(self, dataloader, description: str) -> None:
        dataset = getattr(dataloader, "dataset", None)
        if description == "Evaluation" and self._answers_greedily and isinstance(dataset, Dataset):
            self._metrics["eval"]["greedy_success"] = [rollout_log.greedy_success(self, dataset)]

    @property
    def _answers_greedily(self) -> bool:
        if self.args.eval_greedy is None:
            return self.num_generations_eval > 1 and self.rollout_func is None and not self.use_vllm
        return self.args.eval_greedy and not self.use_vllm
