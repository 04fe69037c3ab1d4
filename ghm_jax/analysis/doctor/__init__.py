"""Is everything here that training needs, and is the data what it should be?"""

from ghm_jax.analysis.doctor.finding import Finding
from ghm_jax.analysis.doctor.machine import examine

__all__ = ["Finding", "examine"]
