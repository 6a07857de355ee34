"""What `scripts/gpu_check.py` runs: its cases, each in a process of its own, and what they leave."""
