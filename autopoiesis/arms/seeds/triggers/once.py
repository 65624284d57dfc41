# Never after the cold start: static provisioning, and the paper's "ILP" row with one plan per run.
def should_reschedule(window, fleet, plan):
    return not plan.groups
