"""Supervised fine-tuning: trainers on TRL's SFTTrainer."""

# by module: what `posttrain` gives by these names
PUBLIC = {
    "dp_sft": ("DPSFTConfig", "DPSFTTrainer"),
    "noisy_sft": ("NoisySFTConfig", "NoisySFTTrainer"),
}
