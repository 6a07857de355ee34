"""A run that is told to end saves a checkpoint that it goes on from, bit for bit."""

import gc
import os
import pickle
import signal
import subprocess
import time

import psutil
import pytest
import torch
from transformers import TrainerCallback

from posttrain import RobustDPOConfig, signals
from posttrain.errors import ConfigError, Preempted
from posttrain.run import checkpoints, preemption
from tests import rollouts
from tests.conftest import make_pairs
from tests.runs import entries, identical
from tests.training import train

RUN = dict(max_steps=4, optim="adamw_torch", learning_rate=1e-2, lr_scheduler_type="linear")


class Sends(TrainerCallback):
    """Sends this process signals in the middle of a step."""

    def __init__(self, step, *numbers, pause=0.0):
        self.step, self.numbers, self.pause = step, numbers, pause

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)
                time.sleep(self.pause)


@pytest.fixture
def sending(monkeypatch):
    """Adds a callback to each trainer that is built."""
    from posttrain.run.construction import ConstructionMixin

    def add(*given, **kwargs):
        finish = ConstructionMixin._finish_construction

        def with_callback(self):
            finish(self)
            self.add_callback(Sends(*given, **kwargs))

        monkeypatch.setattr(ConstructionMixin, "_finish_construction", with_callback)

    yield add


@pytest.mark.core("SIGUSR1")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_run_told_to_end_goes_on_bit_for_bit(tiny_folder, tmp_path, sending, number, monkeypatch):
    before = signal.getsignal(number)
    change, whole = train(tiny_folder, tmp_path / "whole", **RUN)
    with monkeypatch.context():
        sending(2, number)
        with pytest.raises(Preempted, match=rf"{number.name} came: .* step 2 of 4 .*checkpoint-2"):
            train(tiny_folder, tmp_path / "run", **RUN)
    assert signal.getsignal(number) is before
    assert [folder.name for folder in checkpoints.complete(tmp_path / "run")] == ["checkpoint-2"]
    monkeypatch.undo()
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    _, resumed = train(tiny_folder, tmp_path / "run", resume="auto", **RUN)
    ends = [{n: p.detach() for n, p in t.model.named_parameters() if p.requires_grad} for t in (whole, resumed)]
    assert identical(*ends) and [e["loss"] for e in entries(resumed)] == [e["loss"] for e in entries(whole)]


def test_the_minutes_end_a_run_as_a_signal_does(tiny_folder, tmp_path):
    with pytest.raises(Preempted, match="max_minutes: 1e-09 leave no time to go on: the run ended after step 1 of 4"):
        train(tiny_folder, tmp_path, max_minutes=1e-9, save_total_limit=1, **RUN)
    assert len(checkpoints.complete(tmp_path)) == 1


@pytest.mark.slow
def test_an_evaluation_that_was_due_is_left_out(tiny_folder, tmp_path, sending, logged):

    sending(2, signal.SIGTERM)
    with pytest.raises(Preempted):
        train(tiny_folder, tmp_path, held_out=make_pairs(4), eval_strategy="steps", eval_steps=2, **RUN)
    assert "SIGTERM came: the evaluation that was due at step 2 is left out" in logged.text


@pytest.mark.slow
def test_the_epoch_of_a_run_that_ends_early_is_not_over(tiny_folder, tmp_path, sending, logged):

    sending(1, signal.SIGTERM)
    every = dict(save_strategy="epoch", eval_strategy="epoch", logging_strategy="epoch", save_only_model=True)
    with pytest.raises(Preempted, match="checkpoint-1"):
        train(tiny_folder, tmp_path, held_out=make_pairs(4), **RUN | every)
    assert "eval_loss" not in (tmp_path / "checkpoint-1/trainer_state.json").read_text()
    assert checkpoints.find(tmp_path, "auto") == tmp_path / "checkpoint-1", "with all that a run goes on from"


def test_the_minutes_leave_room_for_the_longest_step(monkeypatch):
    clock = iter([0.0, 20.0, 70.0, 90.0])
    monkeypatch.setattr(preemption.time, "monotonic", lambda: next(clock))
    stop = preemption.StopEarly(None)

    class Args:
        save_on_signal, max_minutes, world_size = "auto", 2.5, 1

    assert [bool(stop._asked(Args, True)) for _ in range(3)] == [False, False, False]
    clock = iter([101.0])
    assert stop._reason_of(stop._asked(Args, True), Args) == "max_minutes: 2.5 leave no time to go on"


@pytest.mark.slow
def test_a_handler_of_the_caller_is_left_in_place(tiny_folder, tmp_path, sending):
    got = []
    sending(2, signal.SIGUSR1)
    with signals.handled(lambda number, frame: got.append(number), (signal.SIGUSR1,)):
        assert signal.SIGUSR1 not in preemption.taken() and signal.SIGTERM in preemption.taken()
        train(tiny_folder, tmp_path, **RUN)
    assert got == [signal.SIGUSR1]


def test_a_second_signal_ends_at_once(tiny_folder, tmp_path, sending, monkeypatch):
    monkeypatch.setattr(signals, "SAME_REQUEST", 0.0)
    sending(2, signal.SIGTERM, signal.SIGTERM, pause=0.01)
    with pytest.raises(signals.Terminated) as ended:
        train(tiny_folder, tmp_path, **RUN)
    assert ended.value.code == 143 and not checkpoints.complete(tmp_path)


@pytest.mark.slow
def test_without_it_a_signal_is_for_the_caller(tiny_folder, tmp_path, sending):
    got = []
    sending(2, signal.SIGTERM)
    with signals.handled(lambda number, frame: got.append(number), (signal.SIGTERM,)):
        _, trainer = train(tiny_folder, tmp_path, save_on_signal="never", **RUN)
    assert got == [signal.SIGTERM] and trainer.state.global_step == 4


def test_rollouts_end_where_no_generation_is_under_way(tiny_folder, tmp_path, sending, logged, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    sending(1, signal.SIGTERM)
    run = dict(data=rollouts.prompts([1] * 8), per_device_train_batch_size=4, gradient_accumulation_steps=1)
    with pytest.raises(Preempted, match="after step 2 of 8"):
        rollouts.train(tiny_folder, tmp_path, steps_per_generation=2, max_steps=8, **run)
    assert "SIGTERM came: the run ends where rollouts end, which are not saved" in logged.text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(save_on_signal="always"), "save_on_signal is 'always'; it must be one of auto, never"),
        (dict(max_minutes=0), "max_minutes is 0; give a number of minutes above 0"),
        (dict(max_minutes=float("inf")), "max_minutes is inf"),
        (dict(max_minutes=True), "max_minutes is True"),
        (dict(enable_jit_checkpoint=True, save_on_signal="never"), "leave one of them out"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, given, said):
    with pytest.raises(ConfigError, match=said):
        RobustDPOConfig(str(tmp_path), **given)


def test_transformers_own_setting_saves_where_a_step_ends(tmp_path):
    args = RobustDPOConfig(str(tmp_path), enable_jit_checkpoint=True)
    assert args.save_on_signal == "auto" and not args.enable_jit_checkpoint


def test_a_signal_of_one_rank_is_the_signal_of_all(monkeypatch):
    class Args:
        save_on_signal, max_minutes, world_size, device = "auto", None, 2, "cpu"

    def others_was(tensor, op):
        tensor.copy_(max(int(tensor), signal.SIGUSR1 + 1))

    monkeypatch.setattr("torch.distributed.all_reduce", others_was)
    stop = preemption.StopEarly(None)
    assert stop._reason_of(stop._asked(Args, True), Args) == "SIGUSR1 came"


class Pids(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return os.getpid()


def test_a_worker_of_rows_heeds_nobody_but_its_run():
    loader = preemption.keep_workers(torch.utils.data.DataLoader(Pids(), batch_size=1, num_workers=1))
    pids = iter(loader)
    worker = int(next(pids))
    subprocess.run(["kill", "-TERM", str(worker)], check=True)
    assert [int(pid) for pid in pids] == [worker] * 63
    loader = preemption.keep_workers(torch.utils.data.DataLoader(Pids(), batch_size=1, num_workers=1))
    pids = iter(loader)
    worker = psutil.Process(int(next(pids)))
    worker.terminate()
    assert worker.wait(30) == 0


class ToAll(TrainerCallback):
    """Sends SIGTERM to this process and its children from a process beside them, as `scancel` does."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.workers = [child for child in psutil.Process().children() if child.name().startswith("pt_data")]
            everyone = [os.getpid(), *(worker.pid for worker in self.workers)]
            subprocess.run(["kill", "-TERM", *map(str, everyone)], check=True)
            # what the death of a worker would do comes at once
            time.sleep(0.1)


@pytest.mark.slow
def test_a_job_that_is_told_to_end_whole_saves_with_workers_of_rows(tiny_folder, tmp_path, monkeypatch):
    from posttrain.run.construction import ConstructionMixin

    finish, sends = ConstructionMixin._finish_construction, ToAll()
    monkeypatch.setattr(
        ConstructionMixin, "_finish_construction", lambda self: (finish(self), self.add_callback(sends))
    )
    with pytest.raises(Preempted, match="SIGTERM came: the run ended after step 2 of 4"):
        train(tiny_folder, tmp_path, pairs=make_pairs(64), dataloader_num_workers=2, **RUN)
    assert [folder.name for folder in checkpoints.complete(tmp_path)] == ["checkpoint-2"]
    # they end with the loader
    gc.collect()
    assert len(sends.workers) == 2 and not psutil.wait_procs(sends.workers, 60)[1]


def test_a_program_that_does_not_catch_it_ends_with_the_code_and_others_do_not_swallow_it():
    ended = Preempted("SIGTERM came: hub_token is 'abcdefgh'")
    assert ended.code == Preempted.exit_code == 75 and isinstance(ended, SystemExit)
    assert not isinstance(ended, Exception)
    assert str(ended) == str(pickle.loads(pickle.dumps(ended))) == "SIGTERM came: hub_token is '***'"
