"""Replicas: the members of the fleet, their health and metrics, and simulated ones."""
