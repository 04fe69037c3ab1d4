"""The GHM single-stage detector in JAX: losses first, and the RetinaNet that trains with them."""

__version__ = "0.1.0"
