"""Telemetry: what happened, window by window, in DuckDB, and the ways to ask for it."""
