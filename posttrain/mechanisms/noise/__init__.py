"""Noise in a model while it is trained: how it is drawn, and where and when it is added."""
