"""What FSDP2 alone does, in one pair of processes, each of which calls `main`; `one_process` is held against it."""

import gc
import json
import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from posttrain import RobustDPOTrainer
from posttrain.errors import PosttrainError
from posttrain.run import report
from tests import rollouts, runs, training
from tests.conftest import make_pairs
from tests.distributed import sharding
from tests.distributed.worker import logits, snapshot

_FULL = dict(peft=False, learning_rate=0.02)
_STEPS = dict(optim="adamw_torch", learning_rate=1e-3, max_grad_norm=1.0, lr_scheduler_type="linear", max_steps=4)
_RANKS = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
# one process makes the same update of each
EQUAL = {
    "checkpointed": dict(gradient_checkpointing=True),
    "clipped": dict(max_grad_norm=0.5),
    "precomputed": _FULL | dict(precompute_ref_log_probs=True),
    "tied": _FULL,
    "evaluated": dict(eval_strategy="steps", eval_steps=1, eval_on_start=True),
    # FSDP leaves these heads spread where the fused head multiplies by them
    "head": dict(adapter=dict(modules_to_save=["lm_head"]), learning_rate=0.02),
    "opt": _FULL,
    "kl": dict(beta=0.1, peft=False, max_steps=1),
}
# resumed from their second step
RESUMED = {
    "lora": _STEPS,
    "full": _STEPS | dict(peft=False),
    "pissa": _STEPS | dict(adapter=dict(init_lora_weights="pissa")),
}
# of one step that moves nothing
BF16 = dict(bf16=True, max_steps=1, learning_rate=0.0, peft=False)


class Failing(RobustDPOTrainer):
    """Its second rank's loss is no number from the second step on."""

    def pair_losses(self, *args):
        losses = super().pair_losses(*args)
        bad = self.state.global_step >= 1 and self.accelerator.process_index == 1
        return losses * float("nan") if bad else losses


def build(name: str, folders: dict, target, **settings):
    """A trainer of a case; on one process it takes a step's rows in one batch."""
    if name == "kl":
        split = dict(per_device_train_batch_size=4, gradient_accumulation_steps=8)
        return rollouts.build(folders["untied"], target, **split | settings)
    adapter = settings.pop("adapter", None)
    given = dict(pair_loss="dpo", pairs=make_pairs(16), held_out=make_pairs(8, seed=5)) | settings
    if adapter is None:
        return training.build(folders.get(name, folders["untied"]), target, **given)
    rows, held_out = given.pop("pairs"), given.pop("held_out")
    args = training.RobustDPOConfig(**training.settings(target, **given))
    more = dict(train_dataset=rows, eval_dataset=held_out, peft_config=runs.lora(**adapter))
    return RobustDPOTrainer(folders["untied"], args=args, **more)


def log_probs(trainer, model) -> torch.Tensor:
    """Of the answers of a few fixed pairs, by token."""
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad(), trainer.accelerator.autocast():
        return trainer.score(model, batch).outputs.log_probs


def main(folders: str, out: str) -> None:
    folders, out, tensors, told = json.loads(folders), Path(out), {}, {}
    report.plot_curves = lambda *args: None
    report.git_commit = lambda: None
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    common = sharding.on_cpus() | _RANKS

    def fresh(name, target=None, **settings):
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        gc.collect()
        return build(name, folders, out / (target or name), **common | settings)

    def keep(name, values):
        tensors.update({f"{name}|{part}": value.contiguous().cpu() for part, value in values.items()})

    for name, case in EQUAL.items():
        split = dict(gradient_accumulation_steps=8) if name == "kl" else {}
        keep(name, runs.fit(fresh(name, **case | split), snapshot)[0])
    for name, case in RESUMED.items():
        _, straight = runs.fit(fresh(name, **case, save_strategy="steps", save_steps=2), snapshot)
        keep(f"{name}-straight", snapshot(straight.model))
        _, resumed = runs.fit(fresh(name, **case, save_strategy="no"), snapshot, str(out / name / "checkpoint-2"))
        keep(f"{name}-resumed", snapshot(resumed.model))
        straight.save_model(str(out / name / "saved"))
        tensors[f"{name}-logits"] = logits(straight)
        del straight, resumed
    trainer = fresh("bf16", **BF16)
    seen, score = {}, trainer.score

    def noting(model, batch, **kwargs):
        scores = score(model, batch, **kwargs)
        seen["policy" if torch.is_grad_enabled() else "reference"] = str(scores.chosen_logps.dtype)
        return scores

    trainer.score = noting
    trainer.train()
    told["dtypes"], trainer.score = seen, score
    tensors["bf16|policy"] = log_probs(trainer, trainer.model_wrapped).float()
    tensors["bf16|reference"] = log_probs(trainer, trainer.ref_model).float()
    trainer = fresh("dead")
    silenced = [module for name, module in trainer.model.named_modules() if name.endswith("q_proj.lora_B.default")]
    silenced[0].register_forward_hook(lambda module, given, output: output * 0)
    told["dead"] = refused(trainer.train)
    told["diverged"] = refused(fresh("diverged", trainer_class=Failing, max_steps=3).train)
    told["early"] = refused(fresh("early").evaluate)
    if int(os.environ["RANK"]) == 0:
        save_file(tensors, out / "tensors.safetensors")
        (out / "told.json").write_text(json.dumps(told))


def refused(do) -> str:
    try:
        do()
    except PosttrainError as error:
        return str(error)
    return ""
