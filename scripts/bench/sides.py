"""The sides of the speed benchmark: each arm's trainer, and what is counted while it trains."""

import dataclasses
import threading
from pathlib import Path
from unittest import mock


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the arms of one block of rows have in common."""

    section: str
    lengths: str
    reference: str
    arms: tuple[str, ...]
    model: str
    pairs: int = 4
    accumulation: int = 1
    attention: str = "sdpa"


def trainer_class(arm: str, columns: dict):
    """The arm's trainer; `columns` are the reference values it is given, or gets the ones it computes."""
    from trl import DPOTrainer

    from posttrain import RobustDPOTrainer
    from posttrain.mechanisms.prefix_sharing import distribution

    base = DPOTrainer if arm.startswith("trl") else RobustDPOTrainer

    class Arm(base):
        def _precompute_ref_logps(self, dataset, name, batch_size):
            if not columns:
                dataset = super()._precompute_ref_logps(dataset, name, batch_size)
                columns.update({key: list(dataset[key]) for key in ("ref_chosen_logps", "ref_rejected_logps")})
                return dataset
            for key, values in columns.items():
                dataset = dataset.add_column(key, values)
            return dataset

    class Unsorted(Arm):
        def sorted_window(self, batches):
            return batches

    class OneRowAPair(Unsorted):
        def _packed(self, model, batch):
            with mock.patch.object(distribution, "distribute", _one_block_a_row):
                return super()._packed(model, batch)

    return {"sharing": OneRowAPair, "packing": Unsorted}.get(arm, Arm)


def _one_block_a_row(sizes, attention_cost, multiple, few_counts=False):
    return [[i] for i in range(len(sizes))], -(-max(sizes) // multiple) * multiple


class Counts:
    """Tokens that the backbone computes and positions that reach the LM head, by arm (the name of its thread)."""

    def __init__(self):
        self.of: dict[str, list[int]] = {}

    def add(self, place: int, number: int) -> None:
        self.of.setdefault(threading.current_thread().name, [0, 0])[place] += number

    def watch(self, model) -> None:
        def forwarded(module, args, kwargs):
            self.add(0, (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel())

        model.base_model.register_forward_pre_hook(forwarded, with_kwargs=True)

    def watch_head(self):
        """Patches the function through which TRL's fused head scores hidden states (N, hidden)."""
        from trl.trainer import utils

        inner, outer = utils._ChunkedLogProbFunction, self

        class Counted:
            @staticmethod
            def apply(hidden_states, *rest):
                outer.add(1, hidden_states.size(0))
                return inner.apply(hidden_states, *rest)

        return mock.patch.object(utils, "_ChunkedLogProbFunction", Counted)


def make_trainer(setting: Setting, arm: str, rows, folder: Path, steps: int, seed: int, columns: dict, counts: Counts):
    """The arm's trainer over `rows`, all in their order, and the model inside."""
    import torch
    from bench.pairs import MAX_LENGTH, load_model, load_tokenizer
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import DPOConfig

    from posttrain import RobustDPOConfig

    cuda = torch.cuda.is_available()
    attention = "flash_attention_2" if arm == "trl_flash" else setting.attention
    model = load_model(setting.model, attention, torch.bfloat16 if cuda else torch.float32)
    counts.watch(model)
    common = dict(
        output_dir=str(folder / arm),
        per_device_train_batch_size=setting.pairs,
        gradient_accumulation_steps=setting.accumulation,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=setting.reference == "precomputed",
        max_length=MAX_LENGTH,
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=cuda,
        dataloader_pin_memory=cuda,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    if arm.startswith("trl"):
        config = DPOConfig(**common)
    else:
        sharing = "never" if arm == "padded" else "always"
        config = RobustDPOConfig(
            **common, pair_loss="dpo", prefix_sharing=sharing, ref_cache_dir=str(folder / "reference")
        )
    trainer = trainer_class(arm, columns)(
        model,
        args=config,
        train_dataset=rows.remove_columns("length"),
        processing_class=load_tokenizer(setting.model),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.remove_callback(PrinterCallback)
    if len(trainer.train_dataset) != len(rows):
        raise SystemExit(f"{arm} dropped {len(rows) - len(trainer.train_dataset)} pairs, so the sides would differ")
    return trainer


def at_step_end(call):
    from transformers import TrainerCallback

    class AtStepEnd(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            call()

    return AtStepEnd()


def no_curves():
    """The picture that our trainer draws after its last step is no part of any step, and takes seconds."""
    return mock.patch("posttrain.run.report.plot_curves")
