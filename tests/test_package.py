import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import posttrain

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "matplotlib"}


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("module", ["hub", "tables", "environment", "adapters.loading", "data", "cli.push"])
def test_what_needs_no_model_loads_nothing_heavy(module):
    imported = run(f"import posttrain.{module}, sys; print(*sys.modules)").stdout.split()
    assert f"posttrain.{module}" in imported and not HEAVY & set(imported)


def test_importing_the_package_loads_nothing_heavy():
    imported = run("import posttrain, sys; print(*sys.modules)").stdout.split()
    assert not HEAVY & set(imported)


def test_help_of_every_verb_loads_nothing_heavy():
    ways = [[], ["quickstart"], ["data"], *(["data", action] for action in ("inspect", "stats", "convert", "flip"))]
    helped = run(
        "import contextlib, sys, posttrain.cli\n"
        f"for way in {ways}:\n"
        "    with contextlib.suppress(SystemExit): posttrain.cli.main([*way, '--help'])\n"
        "print('MODULES', *sys.modules)"
    ).stdout
    said, _, modules = helped.partition("MODULES")
    assert not HEAVY & set(modules.split())
    assert said.count("usage: ") == len(ways) and "exit codes" in said


def test_the_version_is_printed():
    printed = run("import posttrain.cli; posttrain.cli.main()", "--version").stdout
    assert printed == f"posttrain {posttrain.__version__}\n"


def test_an_error_of_the_library_ends_a_verb_with_its_code(monkeypatch, capsys):
    import posttrain.cli
    from posttrain.errors import DataError

    def fail(args):
        raise DataError("pairs.jsonl does not exist.")

    monkeypatch.setattr("posttrain.cli.quickstart.run", fail)
    assert posttrain.cli.main(["quickstart"]) == 3
    assert capsys.readouterr().err == "posttrain quickstart: error: pairs.jsonl does not exist.\n"


def test_a_missing_verb_is_a_usage_error(capsys):
    import posttrain.cli

    with pytest.raises(SystemExit) as caught:
        posttrain.cli.main([])
    assert caught.value.code == 2
    assert "VERB" in capsys.readouterr().err


def test_public_names_are_found_and_listed():
    from posttrain.trainers.preference.robust_dpo import RobustDPOTrainer

    assert posttrain.RobustDPOTrainer is RobustDPOTrainer
    assert {"RobustDPOTrainer", "RobustDPOConfig"} <= set(dir(posttrain)) & set(posttrain.__all__)
    with pytest.raises(AttributeError, match="module 'posttrain' has no attribute 'RobustDPO'"):
        _ = posttrain.RobustDPO


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_recipes_and_configs_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for shipped in ("recipes", "configs"):
        files = [path.relative_to(ROOT) for path in (ROOT / shipped).rglob("*") if path.suffix in (".py", ".yaml")]
        assert files and {f"posttrain/_{path.as_posix()}" for path in files} <= names
    assert "posttrain/trainers/preference/robust_dpo.py" in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"posttrain", f"posttrain-{posttrain.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_trains_from_an_empty_environment_elsewhere(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"POSTTRAIN_CACHE": str(tmp_path / "cache"), "PATH": f"{python.parent}:{environment['PATH']}"}

    def elsewhere(*command):
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps")
    for lock in ("constraints-cpu.txt", "constraints-quickstart.txt"):
        elsewhere(*pip, "--require-hashes", "--requirement", ROOT / lock)
    elsewhere(*pip, wheel)
    where = elsewhere(
        python, "-c", "from posttrain.paths import configs_dir as c, recipes_dir as r; print(c()); print(r())"
    )
    configs, recipes = map(Path, where.split())
    assert str(configs).startswith(str(tmp_path))
    elsewhere(
        "accelerate", "launch", "--config_file", configs / "accelerate" / "cpu.yaml",
        recipes / "robust_dpo.py", "--config", configs / "robust_dpo" / "cpu.yaml",
        "--model_name_or_path", "embedded:tiny", "--max_train_rows", "8", "--max_steps", "2",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--output_dir", "run",
    )  # fmt: skip
    run_folder = tmp_path / "elsewhere" / "run"
    steps = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in step for step in steps) == 2
    assert (run_folder / "adapter_model.safetensors").is_file()
    assert shutil.which("posttrain", path=str(python.parent))
