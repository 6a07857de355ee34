"""A run that goes on from its newest complete checkpoint: `python -m tests.interruption.child MODEL OUT METHOD`."""

import sys

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.run import report
from tests.conftest import make_pairs
from tests.training import lora, settings

METHODS = {"dpo": dict(pair_loss="dpo"), "dr_dpo": dict(reduction="dr_dpo", beta_prime=0.3)}
STEPS = 12


def main(folder: str, out: str, method: str) -> None:
    # curves take longer to draw than this run does
    report.plot_curves = lambda *args: None
    report.git_commit = lambda: None
    args = settings(
        out,
        optim="adamw_torch",
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        **METHODS[method],
    )
    # 18 rows in steps of 4: epochs end on a short window, and the run passes into a third one
    trainer = RobustDPOTrainer(folder, args=RobustDPOConfig(**args), train_dataset=make_pairs(18), peft_config=lora())
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
