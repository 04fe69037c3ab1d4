"""Is everything here that training needs, and is the data what it should be?"""

from ghm_jax.doctor.finding import Finding
from ghm_jax.doctor.machine import examine

__all__ = ["Finding", "examine"]
