"""Losses and weights as functions of tensors: no model, no trainer, no configuration, no reduction inside."""
