"""Preference optimisation: trainers on TRL's DPOTrainer."""

# by module: what `posttrain` gives by these names
PUBLIC = {
    "robust_dpo": ("RobustDPOConfig", "RobustDPOTrainer"),
}
