"""Offline policy gradients on scored answers: trainers on TRL's SFTTrainer."""

# by module: what `posttrain` gives by these names
PUBLIC = {
    "a_lol": ("ALoLConfig", "ALoLTrainer"),
}
