"""Tasks with a gold answer or a demonstration: reading and checking them."""
