"""The recipe for preference pairs, run in this process: an import takes seconds."""

import contextlib
import io
import json
import runpy
import sys
from unittest import mock

from posttrain.paths import recipes_dir

PAIRS = [{"prompt": f"Is {i} even?", "chosen": " yes", "rejected": f" no, {i}"} for i in range(4)]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def robust_dpo(folder, model, *settings, **given) -> tuple[int, str]:
    """Run the recipe in this folder with these settings, on four pairs by default: exit code, and what stderr says."""
    (folder / "pairs.jsonl").write_text(lines(PAIRS))
    defaults = {
        "model_name_or_path": model, "dataset_name": "pairs.jsonl", "output_dir": "run", "max_steps": 1,
        "per_device_train_batch_size": 2, "use_peft": "true", "lora_r": 2, "lora_target_modules": "all-linear",
        "max_length": 128, "disable_tqdm": "true", "save_strategy": "no", "pair_loss": "rdpo",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in (defaults | given).items()]
    said = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(sys, "argv", ["robust_dpo.py", *flags, *settings]),
    ):
        try:
            runpy.run_path(str(recipes_dir() / "robust_dpo.py"), run_name="__main__")
        except SystemExit as ended:
            assert "Traceback" not in said.getvalue(), said.getvalue()
            return ended.code, said.getvalue()
    raise AssertionError("The recipe does not end with an exit code.")
