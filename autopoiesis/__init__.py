"""Serving policies for LLM fleets as living code."""

from autopoiesis.kernel_cache import use_kernel_cache

__version__ = "0.1.0"

use_kernel_cache()
