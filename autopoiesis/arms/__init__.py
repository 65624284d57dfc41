"""Arms: what a serving policy is, how it is written, checked, run, and kept.

The lowest room: it knows no other. Policies are data for a small interpreter (`machine`), which the
gateway and the twin run with the same compiled code, so a policy means the same in both.
"""
