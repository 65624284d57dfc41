# Every so many windows, whatever happens: cron, and the trigger of the paper's first seed policy.
PERIOD_WINDOWS = 6


def should_reschedule(window, fleet, plan):
    return not plan.groups or window.windows_since_rescheduling >= PERIOD_WINDOWS
