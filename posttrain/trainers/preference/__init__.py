"""Preference optimisation: trainers on TRL's DPOTrainer."""
