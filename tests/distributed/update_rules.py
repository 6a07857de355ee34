"""Two DDP processes whose updates are made by agreement of micro-gradients, by SAM, and by an optimizer by name."""

import gc
import json
import os
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from posttrain.run import report
from tests.distributed.worker import snapshot
from tests.families import METHODS
from tests.runs import entries

# two ranks of two micro-batches of two rows: the step of one process with four
RANKS = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
WHOLE = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
CASES = {
    "agreement": ("noisy_sft", dict(gradient_agreement=0.8)),
    "agreement-all": ("robust_dpo", dict(gradient_agreement=2.0, prefix_sharing="never")),
    "none-agree": ("noisy_sft", dict(gradient_agreement=1e-6)),
    "sam": ("noisy_sft", dict(sam_rho=0.3)),
    "fisher": ("robust_dpo", dict(sam_rho=0.3, sam_mask="fisher", sam_mask_share=0.3, prefix_sharing="never")),
    "short": ("noisy_sft", dict(sam_rho=0.3, rows=13)),
    "ademamix": ("noisy_sft", dict(optim="pytorch_optimizer:ademamix", learning_rate=1e-3)),
}


def main(folder: str, out: str) -> None:
    report.plot_curves, report.git_commit = (lambda *args: None), (lambda: None)
    out, changes, history = Path(out), {}, {}
    for name, (method, case) in CASES.items():
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        change, trainer = METHODS[method].train(folder, out / name, snapshot=snapshot, **RANKS | case)
        changes |= {f"{name}|{key}": value.contiguous() for key, value in change.items()}
        history[name] = entries(trainer)
        del trainer
        gc.collect()
    if int(os.environ["RANK"]) == 0:
        save_file(changes, out / "changes.safetensors")
        (out / "history.json").write_text(json.dumps(history))
