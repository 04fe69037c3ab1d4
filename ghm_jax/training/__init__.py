"""The training step, what it consists of, and what a training run writes."""
