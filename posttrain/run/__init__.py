"""What every run has, whatever its method: checks, checkpoints, identity, watches, report."""
