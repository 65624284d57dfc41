"""Serving policies for LLM fleets as living code."""

__version__ = "0.1.0"
