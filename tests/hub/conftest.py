import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.hub.fake_hub import TOKEN, FakeHub

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def server():
    server = FakeHub()
    yield server
    server.close()


@pytest.fixture
def hub(server):
    """The fake hub as new: no repository, no fault, user `me` with a token that can write."""
    server.reset()
    return server


@pytest.fixture(scope="session")
def client_environment(server, tmp_path_factory):
    """What a process needs whose hub is the fake one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "POSTTRAIN_LOG": "warning",
    }


@pytest.fixture(scope="session")
def client(client_environment):
    """Call functions of `tests/hub/client.py` in its process: value, or error, kind and exit code, and the log."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub.client"],
        cwd=ROOT,
        env=client_environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(name, **kwargs):
        process.stdin.write(json.dumps({"call": name, "kwargs": kwargs}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return SimpleNamespace(**({"value": None, "error": None, "kind": None, "exit_code": None} | answer))

    yield call
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory, tokenizer):
    """A run as a trainer leaves it on a local base: adapter, card, report, a checkpoint, and files that must stay."""
    return make_run(tmp_path_factory.mktemp("home-of-someone"), tokenizer)


def make_run(home: Path, tokenizer) -> SimpleNamespace:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from posttrain import RobustDPOConfig, RobustDPOTrainer
    from posttrain.hub import clean_readme, write_model_card
    from posttrain.models import tiny_model
    from posttrain.run.report import write_csv, write_resolved_config

    base, run = home / "base", home / "run"
    tiny_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    args = RobustDPOConfig(str(run), pair_loss="rdpo", flip_rate=0.3, report_to=[], deepspeed=None)
    rows = [{"step": step, "loss": 0.7 - 0.1 * step, "rewards/accuracies": 0.5} for step in (1, 2, 3)]
    trainer = SimpleNamespace(
        args=args,
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        state=SimpleNamespace(log_history=[{"step": 3, "eval_rewards/accuracies": 0.75}], global_step=3),
        train_dataset=range(24),
        eval_dataset=range(6),
        _name=RobustDPOTrainer._name,
        _tag_names=RobustDPOTrainer._tag_names,
        _paper=RobustDPOTrainer._papers["rdpo"],
    )
    for folder in (run / "checkpoint-2", run / "checkpoint-3", run):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training_args.bin").write_bytes(str(home).encode())
        if folder != run:
            (folder / "optimizer.pt").write_bytes(str(home).encode())
            (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(folder)}))
            clean_readme(folder)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_csv(rows, run / "metrics.csv")
    (run / "curves.png").write_bytes(b"\x89PNG")
    sections = {"data": {"dataset_name": str(home / "pairs.jsonl")}, "model": {"model_name_or_path": str(base)}}
    write_resolved_config(args, run / "resolved_config.yaml", sections)
    write_model_card(trainer)
    (run / "notes.txt").write_text("for me alone")
    return SimpleNamespace(home=home, base=base, folder=run, model=model.eval(), trainer=trainer)
