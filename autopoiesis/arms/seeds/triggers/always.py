# After every window: the paper's "Greedy" row, which replans at each monitoring step.
def should_reschedule(window, fleet, plan):
    return True
