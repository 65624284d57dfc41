"""Where slow policies run: a process that can compute, answer, and nothing else.

`slow_arm` is the way in. `child` is what runs over there; it imports this package with nothing but the
standard library beside it, so this file stays empty.
"""
