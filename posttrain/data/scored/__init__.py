"""Scored answers: reading and scoring them, their scales, baselines and tokens."""
