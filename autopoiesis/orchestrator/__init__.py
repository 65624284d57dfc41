"""The orchestrator: the window loop that learns which arm serves best, and the processes around it."""
