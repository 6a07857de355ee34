"""Adapters on disk, read onto their base models."""
