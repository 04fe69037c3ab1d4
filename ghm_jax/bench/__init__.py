"""Measurements that `ghm-jax bench` prints. Compare times only within one run."""
