# When it pays: HexGen-3's test. A change is worth it if the throughput gained over the rest of the
# time that the traffic is expected to stay exceeds the service lost while the plan changes.
def served_rps(fleet, plan, window):
    return sum(
        min(fleet.capacity_rps(plan, demand.model), demand.arrival_rate_rps)
        for demand in window.demand
    )


def should_reschedule(window, fleet, plan):
    if not plan.groups:
        return True
    new = schedule(window, fleet, plan)
    change_s = fleet.migration_s(plan, new)
    before, after = served_rps(fleet, plan, window), served_rps(fleet, new, window)
    return (after - before) * (fleet.stable_s - change_s) > before * change_s
