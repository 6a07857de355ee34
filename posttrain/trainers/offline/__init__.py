"""Offline policy gradients on scored answers: trainers on TRL's SFTTrainer."""
