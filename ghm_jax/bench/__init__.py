"""Measurements that `ghm-jax bench` prints. Times are compared within one run only."""
