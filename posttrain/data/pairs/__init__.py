"""Preference pairs: reading them, their faults, checks before the model loads."""
