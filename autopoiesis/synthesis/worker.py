"""One synthesis cycle in a process of its own: a brief on stdin, the verdicts as JSON on stdout.

It owns nothing: killed at any moment, nothing is lost. Run it as `python -m
autopoiesis.synthesis.worker`.
"""

import os
import sys

from autopoiesis.synthesis.confine import confine

BAD_BRIEF = 2
"""Exit code for a brief that cannot be worked on; stderr says why in one sentence."""


def main() -> int:
    """Run the cycle."""
    confine()
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed must not mix with the answer
    # The rest takes a second of CPU to import: at the lowest priority, so only now.
    from autopoiesis.synthesis.brief import BriefError  # noqa: PLC0415
    from autopoiesis.synthesis.cycle import answer_to  # noqa: PLC0415

    try:
        verdicts = answer_to(sys.stdin.buffer.read())
    except BriefError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_BRIEF
    with os.fdopen(answer, "wb") as out:
        out.write(verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
