"""What an engine may do at once: the limits that a restart can change."""

from dataclasses import dataclass, fields, replace

from autopoiesis.twin.latency import Profile


class LimitsError(ValueError):
    """A limit is none; the message says which, and what it must be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one replica; 0 wherever it is as the replica was started first."""

    max_num_seqs: int = 0
    """Requests that it computes at once."""
    max_num_batched_tokens: int = 0
    """Tokens that it computes in one step."""
    tensor_parallel: int = 0
    """GPUs that it spans."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise LimitsError(f"{field.name} must be a whole number above 0, not {value!r}.")

    def over(self, other: "Limits") -> "Limits":
        """Return these, and the other's wherever these say nothing."""
        return Limits(
            self.max_num_seqs or other.max_num_seqs,
            self.max_num_batched_tokens or other.max_num_batched_tokens,
            self.tensor_parallel or other.tensor_parallel,
        )

    def __str__(self) -> str:
        """Return what they say, in words."""
        said = [f"{field.name} {getattr(self, field.name)}" for field in fields(self)]
        return ", ".join(word for word in said if not word.endswith(" 0")) or "its first limits"


def with_limits(profile: Profile, limits: Limits) -> Profile:
    """Return the profile of an engine with these limits."""
    return replace(
        profile,
        max_num_seqs=limits.max_num_seqs or profile.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens or profile.max_num_batched_tokens,
    )
