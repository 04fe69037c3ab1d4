"""Checks that a machine and its data sets have what training needs."""

from ghm_jax.analysis.doctor.finding import Finding, fault_of
from ghm_jax.analysis.doctor.machine import examine

__all__ = ["Finding", "examine", "fault_of"]
