"""Gateway: Envoy, the picker that decides for it, and load to drive it."""
