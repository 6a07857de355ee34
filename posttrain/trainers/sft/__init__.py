"""Supervised fine-tuning: trainers on TRL's SFTTrainer."""
