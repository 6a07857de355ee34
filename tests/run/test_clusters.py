"""The lines of docs/clusters.md, as they stand there, with two processes on the CPU."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from posttrain.cli import main
from tests.runs import identical

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/clusters.md").read_text()
RUN = dict(
    model_name_or_path="embedded:tiny", dataset_name="pairs.jsonl", use_peft=True, lora_r=4,
    lora_target_modules="all-linear", flip_rate=0.2, per_device_train_batch_size=2, max_length=64, learning_rate=1e-3,
    logging_steps=1, save_steps=1000, report_to="none", disable_tqdm=True, use_cpu=True, max_steps=100000,
)  # fmt: skip


def blocks(heading: str) -> list[str]:
    """The blocks of code below a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with data, settings, and a `scontrol` that notes what it is asked for."""
    rows = [{"prompt": f"{i} + 2 =", "chosen": f" {i + 2}", "rejected": f" {i + 3}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "bin").mkdir()
    for name, line in (("scontrol", 'echo "$@" >> asked'), ("curl", "test -e notice")):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return tmp_path


def start(lines: str, folder: Path):
    here = {"--launch ddp": "--launch cpu_ddp", "sleep 5": "sleep 0.1", " /runs/first": " runs/first", " /runs/": " "}
    for ours, instead in here.items():
        lines = lines.replace(ours, instead)
    with open(folder / "log", "a") as log:
        return subprocess.Popen(["bash", "-c", lines], cwd=folder, stdout=log, stderr=log)


def steps(folder: Path) -> int:
    path = folder / "runs/first/metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(folder: Path, number: int, process) -> None:
    while steps(folder) < number and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, (folder / "log").read_text()[-3000:]


@pytest.mark.slow
def test_a_job_of_slurm_is_put_into_the_queue_again_and_goes_on(folder):
    script, limit = blocks("Slurm")
    job = start(script, folder)
    wait_for_steps(folder, 2, job)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait() == 75 and (folder / "asked").read_text() == "requeue 7\n"
    first = steps(folder)
    job = start(limit.replace("--max_minutes 470", f"--max_steps {first + 2}"), folder)
    job.wait()
    assert steps(folder) == first + 3, "two more steps and the summary"
    assert (folder / "asked").read_text() == "requeue 7\n"


@pytest.mark.slow
def test_the_minutes_put_a_job_into_the_queue_again(folder):
    job = start(blocks("Slurm")[1].replace("470", "0.001"), folder)
    job.wait()
    assert (folder / "asked").read_text() == "requeue 7\n" and (folder / "runs/first/checkpoint-1").is_dir()


@pytest.mark.slow
def test_a_notice_of_a_spot_machine_ends_the_run_with_a_checkpoint(folder):
    job = start(blocks("Spot machines")[0], folder)
    wait_for_steps(folder, 1, job)
    (folder / "notice").touch()
    assert job.wait() == 75


def test_the_exit_codes_and_the_command_of_the_page_are_those_of_the_program(capsys):
    job = yaml.safe_load(blocks("Kubernetes")[0])["spec"]
    codes = [rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]]
    with pytest.raises(SystemExit):
        main(["--help"])
    told = set(map(int, re.findall(r"\b\d+\b(?= [a-z])", capsys.readouterr().out.split("exit codes:")[1])))
    assert codes == [[75], [2, 3, 5]] and {code for some in codes for code in some} <= told
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:3] == ["posttrain", "train", "robust_dpo"]


@pytest.mark.slow
def test_a_pod_that_is_evicted_saves(folder):
    """As the first process of a namespace of its own, where the machine lets us have one."""
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("the machine gives no namespaces")
    command = yaml.safe_load(blocks("Kubernetes")[0])["spec"]["template"]["spec"]["containers"][0]["command"]
    pod = start(f"exec {' '.join([*alone, *command])}", folder)
    wait_for_steps(folder, 1, pod)
    (first,) = Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()
    os.kill(int(first), signal.SIGTERM)
    assert pod.wait() == 75, (folder / "log").read_text()[-3000:]


@pytest.mark.slow
def test_two_ranks_that_were_ended_go_on_as_those_that_were_not(folder):
    line = "posttrain train robust_dpo --config run.yaml --launch cpu_ddp --max_steps 6 --output_dir"
    for name, more, code in (("whole", "", 0), ("broken", "--max_minutes 0.001", 75), ("broken", "", 0)):
        job = start(f"{line} {name} --resume_from_checkpoint auto {more}", folder)
        assert job.wait() == code, (folder / "log").read_text()[-3000:]
    assert (folder / "broken/checkpoint-1").is_dir()
    logs = ((folder / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "broken"))
    whole, broken = (list(map(json.loads, rows)) for rows in logs)
    assert [row["loss"] for row in whole[:6]] == [row["loss"] for row in broken[:6]]
    ends = [load_file(folder / name / "adapter_model.safetensors") for name in ("whole", "broken")]
    assert identical(*ends)
