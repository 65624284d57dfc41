"""One synthesis cycle in a process of its own: a brief on stdin, the verdicts as JSON on stdout.

It owns nothing: killed at any moment, nothing is lost. It has no network: where language models are
asked, a clerk does it, and `--clerk` is the number of the socket to it. With `--recording FILE` the
replies of a recorded cycle are given again. Run it as `python -m autopoiesis.synthesis.worker`.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from autopoiesis.synthesis.confine import confine, confine_network

BAD_BRIEF = 2
"""Exit code for a brief that cannot be worked on; stderr says why in one sentence."""


def main() -> int:
    """Run the cycle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clerk", type=int, metavar="FD")
    parser.add_argument("--recording", type=Path, metavar="FILE")
    options = parser.parse_args()
    confine()
    confine_network(())
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed must not mix with the answer
    # The rest takes a second of CPU to import: at the lowest priority, so only now.
    from autopoiesis.synthesis.brief import BriefError  # noqa: PLC0415
    from autopoiesis.synthesis.cycle import answer_to  # noqa: PLC0415
    from autopoiesis.synthesis.llm.courier import Courier  # noqa: PLC0415
    from autopoiesis.synthesis.llm.exchange import read_recording  # noqa: PLC0415

    try:
        clerk = options.clerk
        courier = None if clerk is None else Courier(socket.socket(fileno=clerk))
        recording = read_recording(options.recording) if options.recording else None
        verdicts = answer_to(sys.stdin.buffer.read(), courier, recording)
    except BriefError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_BRIEF
    with os.fdopen(answer, "wb") as out:
        out.write(verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
