"""The model that clients of a recipe share, the trainers of their turns, and its evaluation after a round."""

import copy
import dataclasses

# of the run, and not of a turn
_OF_ONE_RUN = {"resume_from_checkpoint": None, "model_init_kwargs": None}


def load_model(model_id: str, args, peft_config):
    """Load the base and put a LoRA on it whose A is drawn by the run's seed."""
    from peft import get_peft_model
    from transformers import set_seed
    from trl.trainer.utils import create_model_from_path

    from posttrain.run import checks

    given = {name: value for name, value in (args.model_init_kwargs or {}).items() if value is not None}
    with checks.upstream_refusals(), checks.building("the model"):
        model = create_model_from_path(model_id, **given)
        set_seed(args.seed)
        return get_peft_model(model, copy.deepcopy(peft_config))


def builder(args, tokenizer):
    """Return what makes the trainer of a client's turn."""
    from transformers import PrinterCallback

    from posttrain import DPSFTTrainer, NoisySFTTrainer

    quiet = dict(save_strategy="no", eval_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
    args = dataclasses.replace(args, **quiet, **_OF_ONE_RUN)
    kind = NoisySFTTrainer if args.privacy is None else DPSFTTrainer

    def build(model, rows, seed):
        own = copy.copy(args)
        own.seed = seed
        trainer = kind(model=model, args=own, train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        return trainer

    return build


class Evaluation:
    """Evaluates shared factors on rows that are nobody's, which are tokenised once."""

    def __init__(self, clients, args, tokenizer, rows) -> None:
        quiet = dict(save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True)
        self._args = dataclasses.replace(args, **quiet, **_OF_ONE_RUN)
        self._clients, self._tokenizer, self._rows = clients, tokenizer, rows

    def __call__(self, shared) -> dict[str, float]:
        from transformers import PrinterCallback

        from posttrain import NoisySFTTrainer
        from posttrain.mechanisms.as_found import collected_alone, left_as_found
        from posttrain.run.mixin import without_folder

        adapter = self._clients.adapter
        adapter.load(shared)
        with collected_alone(), left_as_found(adapter.model), without_folder():
            trainer = NoisySFTTrainer(
                model=adapter.model,
                args=copy.copy(self._args),
                train_dataset=self._rows,
                eval_dataset=self._rows,
                processing_class=self._tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            self._rows = trainer.eval_dataset
            found = trainer.evaluate()
        names = {"eval_loss": "loss", "eval_mean_token_accuracy": "mean_token_accuracy"}
        return {name: found[upstream] for upstream, name in names.items() if upstream in found}
