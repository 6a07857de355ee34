"""Two ranks with a disk of their own each, as on two machines without a common one; each rank calls `main`."""

import json
import os
import shutil
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import gather_object

from posttrain.errors import ConfigError
from posttrain.run import report
from tests import training


def main(model: str, out: str) -> None:
    report.plot_curves = lambda *args: None
    report.git_commit = lambda: None
    rank, told = int(os.environ["RANK"]), {}
    disks = [Path(out) / str(number) for number in (0, 1)]
    shared, own = disks[0], disks[rank]
    own.mkdir()

    def run(where: Path, **settings):
        PartialState().wait_for_everyone()
        os.chdir(where)
        case = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3) | settings
        trainer = training.build(model, "run", **case)
        try:
            trainer.train(resume_from_checkpoint="auto")
        except ConfigError as error:
            return str(error)
        return [str(trainer.resumed_from), trainer.state.global_step]

    training.build(model, out, max_steps=1)
    run(shared, max_steps=2, save_strategy="steps", save_steps=2)
    told["of rank 0 alone"] = run(own)
    if rank:
        shutil.copytree(shared / "run", own / "run", dirs_exist_ok=True)
    told["of both"] = run(own)
    PartialState().wait_for_everyone()
    if rank == 0:
        shutil.rmtree(own / "run")
    told["of rank 1 alone"] = run(own)
    told = gather_object([told])
    if rank == 0:
        (Path(out) / "told.json").write_text(json.dumps(told))
