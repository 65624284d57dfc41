"""The proposer behind which anyone can stand: briefs go into a folder, policies come out of it.

`brief.md` says what is wanted; each `NAME.policy` beside it is tried once per content, and
`NAME.verdict` then tells its author what came of it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.language import thought_of
from autopoiesis.atomic import write_atomically
from autopoiesis.synthesis.brief import Brief, BriefError
from autopoiesis.synthesis.letter import letter
from autopoiesis.synthesis.proposer import Account, Parent, Proposal
from autopoiesis.telemetry.records import CandidateRow

CONTENT = "content "
LARGEST_FILE = 1 << 16
"""Bytes read of a file; the language allows far less."""


class FilesProposer:
    """Reads policies that a person or a program has written into a folder."""

    origin = Origin.FILES
    account = Account()

    def __init__(self, folder: Path) -> None:
        """Use `folder`, made if it is missing; BriefError if it cannot be."""
        self._folder = folder
        self._asked: dict[str, Path] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BriefError(
                f"Cannot use {folder} for policy files: {error.strerror}; name another folder."
            ) from None

    def propose(
        self, brief: Brief, parents: Sequence[Parent], n: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Write the brief, and return at most n policies that were not tried before."""
        del rng
        _write(self._folder / "brief.md", letter(brief, parents))
        proposals: list[Proposal] = []
        for path in sorted(self._folder.glob("*.policy")):
            if len(proposals) == n:
                break
            try:
                with path.open("rb") as file:
                    source = file.read(LARGEST_FILE)
            except OSError:
                continue  # it is gone again, or not for us to read
            digest = _digest(source)
            if digest in self._asked or _tried(path) == digest:
                continue
            self._asked[digest] = path
            thought = thought_of(source.decode("utf-8", "replace")) or path.stem
            proposals.append(Proposal(source, self.origin, thought=thought))
        return proposals

    def learn(self, verdicts: Sequence[tuple[Proposal, CandidateRow]]) -> None:
        """Write each policy's verdict beside it: from now on that content counts as tried.

        Only a finished cycle comes here, so one that was killed loses no policy.
        """
        for proposal, row in verdicts:
            digest = _digest(proposal.source)
            path = self._asked.get(digest)
            if path is not None:
                told = f"{row.verdict} ({row.gate}): {row.reason}\npolicy {row.arm_id or 'none'}\n"
                _write(path.with_suffix(".verdict"), f"{CONTENT}{digest}\n{told}")


def _digest(source: str | bytes) -> str:
    return hashlib.sha256(source.encode() if isinstance(source, str) else source).hexdigest()


def _tried(path: Path) -> str:
    """Return the digest of the content on which a verdict lies beside the policy."""
    try:
        return path.with_suffix(".verdict").read_text().split("\n", 1)[0].removeprefix(CONTENT)
    except (OSError, UnicodeDecodeError):
        return ""


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise BriefError(
            f"Cannot write {path}: {error.strerror}; make the folder writable."
        ) from None
