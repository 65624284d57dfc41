# When the load leaves a band around its target, and not soon after the last time: the rule of
# Kubernetes' Horizontal Pod Autoscaler (tolerance 10 %; its waiting time is 300 s).
TARGET = 0.75
TOLERANCE = 0.1
COOL_DOWN_WINDOWS = 3


def should_reschedule(window, fleet, plan):
    if not plan.groups or fleet.lost > 0:
        return True
    if window.windows_since_rescheduling < COOL_DOWN_WINDOWS:
        return False
    return abs(window.utilisation / TARGET - 1.0) > TOLERANCE
