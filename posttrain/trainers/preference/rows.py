"""The rows of preference trainers: checked and tokenised as the constructor's, wherever they come from."""

from collections.abc import Mapping

from datasets import Dataset

from posttrain.data import columns, formats, objects, processing
from posttrain.data.pairs import schema
from posttrain.data.tokens import as_learned, as_rendered
from posttrain.trainers.preference import prepare, reference_logps

_SEQUENCES = (("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids"))


class PairRows:
    """Prepares data sets of pairs for TRL's DPOTrainer, those given to `evaluate` among them."""

    # stands on DPOTrainer.evaluate
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate as `trl.DPOTrainer.evaluate` does; a data set given here is checked as the constructor's are.

        Raises DataError and ConfigError as the constructor does.
        """
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._checked(dataset, str(name)) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._checked(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _checked(self, dataset, name: str):
        known = set(objects.names_of(dataset))
        if not known or known.issuperset(formats.TOKEN_COLUMNS):
            return dataset
        args, dataset = self.args, columns.prepare(dataset, name, prepare.READ)
        report = schema.check_preferences(
            dataset, self.processing_class, args.max_length, name, args.truncation_mode,
            processing.generation_stop_ids(self.model), getattr(args, "end_of_turn", "warn"),
        )  # fmt: skip
        if report is not None:
            self._limits.check_reports({name: report}, {name: dataset}, self.processing_class, args.max_length)
        prepare.check_flip_rates(args, None, {name: dataset})
        return dataset

    def calibration_ids(self, rows):
        for row in rows:
            for _, side in _SEQUENCES:
                yield [*row["prompt_ids"], *row[side]][: self.args.max_length]

    # stands on DPOTrainer._set_signature_columns_if_needed
    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for name in (*self.extra_columns, self.args.length_column_name):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    # stands on DPOTrainer._prepare_dataset, which would look for text again
    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if {"prompt_ids", "chosen_ids", "rejected_ids"}.issubset(objects.names_of(dataset)):
            dataset = self._short_enough(dataset, args)
        else:
            dataset = as_rendered(dataset, processing_class)
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            given, dataset = dataset, as_learned(dataset, processing_class, dataset_name)
            if dataset is not given:
                dataset = self._short_enough(dataset, args)
        if isinstance(dataset, Dataset):
            # every row, where a sample was looked at before
            name = {"train": "train_dataset", "eval": "eval_dataset"}.get(dataset_name, dataset_name)
            self._limits.check(dataset, _SEQUENCES, processing_class, name, args.max_length)
        if args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Dataset):
            return dataset
        # upstream's sampler reads lengths from a column, or from `input_ids`, which pairs do not have
        return dataset.add_column(args.length_column_name, [reference_logps.length_of(row) for row in dataset])

    @staticmethod
    def _short_enough(dataset, args):
        limit = prepare.prompt_limit(args)
        if limit is None:
            return dataset
        return dataset.filter(_is_shorter, input_columns=["prompt_ids"], fn_kwargs={"limit": limit})


def _is_shorter(ids: list[int], limit: int) -> bool:
    return len(ids) < limit
