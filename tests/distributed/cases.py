"""What is trained on two ranks and, for comparison, on one; shared by the worker and the tests."""

DR_DPO = dict(reduction="dr_dpo", beta_prime=0.3)
METHODS = {"dpo": dict(pair_loss="dpo"), "rdpo": dict(pair_loss="rdpo", flip_rate=0.2), "dr_dpo": DR_DPO}
# pairs per rank and micro-batch, accumulation steps; one process takes all 8 at once
SPLITS = {"2x4": (4, 1), "2x2x2": (2, 2)}

EQUAL = {}
for _method, _settings in METHODS.items():
    for _split, (_size, _steps) in SPLITS.items():
        # 13 rows: the second step holds 5, and the ranks' last round is filled up by repeats
        for _rows in (16, 13):
            EQUAL[f"{_method}-{_split}-{_rows}"] = dict(
                _settings, rows=_rows, per_device_train_batch_size=_size, gradient_accumulation_steps=_steps
            )
EQUAL["dr_dpo-cached-2x2x2-13"] = dict(EQUAL["dr_dpo-2x2x2-13"], precompute_ref_log_probs=True)
EQUAL["dr_dpo-full-2x2x2-13"] = dict(EQUAL["dr_dpo-2x2x2-13"], peft=False)
EQUAL["rdpo-full-2x4-16"] = dict(EQUAL["rdpo-2x4-16"], peft=False)
EQUAL["dr_dpo-padded-2x2x2-13"] = dict(EQUAL["dr_dpo-2x2x2-13"], prefix_sharing="never")

LOCAL = {"dr_dpo-local-2x2x2-16": dict(EQUAL["dr_dpo-2x2x2-16"], dr_dpo_scope="micro_batch")}
RESCALE = {"dr_dpo-rescale-2x2x2-13": dict(EQUAL["dr_dpo-2x2x2-13"], dr_dpo_window="rescale")}

# 32 made-up rollouts a step, eight groups of four that lie across ranks and micro-batches
ROLLOUTS = {
    "grpo": dict(),
    "qae": dict(preset="qae", num_generations=4),
    "qae-all-rows": dict(preset="qae", num_generations=4, drop_zero_advantage_rows=False, prefix_sharing="never"),
    "hpt": dict(preset="hpt", num_generations=4),
    "hpt-full": dict(preset="hpt", num_generations=4, peft=False),
}
ROLLOUT_SPLIT = dict(per_device_train_batch_size=2, gradient_accumulation_steps=8)

# scored answers, of which all but a few are kept; a step's 8 lie across ranks and micro-batches
_SCORED = dict(rows=20, learning_rate=0.003, per_device_train_batch_size=2, gradient_accumulation_steps=2)
SCORED = {
    "a_lol": dict(_SCORED, variant="a_lol"),
    "a_lol-seq-full": dict(_SCORED, variant="a_lol_seq", peft=False),
    "a_lol-sampled": dict(_SCORED, variant="a_lol", advantage_weighting="sample"),
    "a_lol-head": dict(_SCORED, variant="a_lol", value="head", value_folds=2, value_learning_rate=0.01),
}


def whole(case: dict) -> dict:
    """The same case on one process, all 8 pairs of a step in one padded batch."""
    one = dict(per_device_train_batch_size=8, gradient_accumulation_steps=1, precompute_ref_log_probs=False)
    return case | one | dict(prefix_sharing="never")
