"""Policy gradients on rollouts: trainers on TRL's GRPOTrainer."""
