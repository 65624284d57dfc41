"""The controlled comparison: scenarios, contestants, measures, and what came of it."""
