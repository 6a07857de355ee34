"""Policy gradients on rollouts: trainers on TRL's GRPOTrainer."""

# by module: what `posttrain` gives by these names
PUBLIC = {
    "trainers": ("HPTConfig", "HPTTrainer", "PolicyGradientConfig", "PolicyGradientTrainer", "QAEConfig", "QAETrainer"),
}
