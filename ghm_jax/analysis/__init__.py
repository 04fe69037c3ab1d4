"""Measurements of runs, data sets and machines, which they leave unchanged."""
