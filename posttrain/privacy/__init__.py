"""Differential privacy of training rows: settings, accounting, draws of a step's rows, a ledger, an audit."""
