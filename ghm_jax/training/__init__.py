"""The training step, what it is built of, and what a training run writes."""
