"""The recipe for preference pairs, run in this process: an import takes seconds."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from unittest import mock

from posttrain import config
from posttrain.paths import configs_dir, recipes_dir

PAIRS = [{"prompt": f"Is {i} even?", "chosen": " yes", "rejected": f" no, {i}"} for i in range(4)]


RECIPES = sorted(path.stem for path in recipes_dir().glob("*.py"))


def words(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def shipped(recipe: str, name: str = "cpu") -> Path:
    return configs_dir() / recipe / f"{name}.yaml"


def settings_of(recipe: str, *words: str) -> tuple:
    """Return the sections of settings that a recipe reads from a command line: rows, model, method."""

    class Parsed(Exception):
        """What the recipe read."""

    def parsed(sections, *args):
        # settings of a private run may stand beside these
        raise Parsed(config.parse(sections, *args)[:3])

    path = recipes_dir() / f"{recipe}.py"
    main = runpy.run_path(str(path))["main"]
    # the recipe's own, or that of the function which recipes share
    holder = main.__globals__ if "parse" in main.__globals__ else vars(sys.modules[main.__globals__["run"].__module__])
    with mock.patch.dict(holder, parse=parsed), mock.patch.object(sys, "argv", [str(path), *words]):
        try:
            main()
        except Parsed as found:
            return found.args[0]
    raise AssertionError("The recipe reads no settings.")


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
