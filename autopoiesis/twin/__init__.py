"""Twin: a simulator of vLLM replicas and the traces that drive it."""
