"""Supervised fine-tuning: trainers on TRL's SFTTrainer."""

# by module: what `posttrain` gives by these names
PUBLIC = {
    "noisy_sft": ("NoisySFTConfig", "NoisySFTTrainer"),
}
