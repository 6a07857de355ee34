"""The cases, a module each, which has a `CASE`; whoever adds one adds a module."""
