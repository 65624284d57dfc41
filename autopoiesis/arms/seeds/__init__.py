"""The arms that people wrote: what routers do today, and the baselines to beat."""

from importlib.resources import files

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.files import arm_from_source


def seed_arms() -> tuple[Arm, ...]:
    """Return the human arms, live, in the order of their names."""
    found = [file for file in files(__name__).iterdir() if file.name.endswith(".policy")]
    return tuple(
        arm_from_source(
            file.read_text("ascii"),
            name=file.name.removesuffix(".policy"),
            origin=Origin.HUMAN,
            state=State.LIVE,
            created_at=0.0,
            reason="written by people; always in the pool",
        )
        for file in sorted(found, key=lambda file: file.name)
    )
