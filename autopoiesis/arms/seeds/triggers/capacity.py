# When GPUs come or go: the trigger of SpotServe and of elastic clouds.
def should_reschedule(window, fleet, plan):
    if not plan.groups or fleet.lost > 0:
        return True
    return any(gpu.available != gpu.available_before for gpu in fleet.gpus)
