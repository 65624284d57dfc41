"""The proposer that asks language models: a question, whole policies back, one chance to repair each."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopoiesis.arms.arm import Origin, arm_id
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.arms.parts import parts_of
from autopoiesis.arms.slow import verify_slow
from autopoiesis.synthesis import letter
from autopoiesis.synthesis.brief import Brief
from autopoiesis.synthesis.letter import Message
from autopoiesis.synthesis.llm.answer import Draft, drafts_in
from autopoiesis.synthesis.llm.conversation import (
    FINAL,
    Ask,
    Correspondent,
    Fault,
    Reply,
    Verdict,
)
from autopoiesis.synthesis.proposer import Account, Parent, Proposal
from autopoiesis.telemetry.records import CandidateRow

LONGEST_KEPT = 100_000
"""Characters of a question and of an answer that are kept with a policy."""
PATIENCE = 3
"""Answers in a row with nothing new after which a cycle's author is not asked again."""
SHORTEST_PROMPT_BYTES = 2_000
"""A prompt that does not fit is halved down to this."""
MOST_REMARKS = 8
RACED = frozenset({"race", "holdout", "tuning", "promoted", "tuned"})
"""Gates at which a gain over the best incumbent has been measured on whole windows."""


@dataclass(slots=True)
class _Answer:
    """An answer and what it has cost so far, repairs included."""

    model: str
    tokens: int
    cost_usd: float


class ModelAuthor:
    """Has policies written by language models. It never raises for what they do."""

    def __init__(
        self, origin: Origin, correspondent: Correspondent, policies: int, *, grammar: bool = False
    ) -> None:
        """Ask for `policies` at a time; with `grammar`, as so many answers held to the language."""
        self.origin = origin
        self._correspondent = correspondent
        self._policies = policies
        self._grammar = grammar
        self._most_bytes = letter.MOST_BYTES
        self._seen: set[str] = set()
        self._barren = 0
        self._tokens = 0
        self._cost_usd = 0.0
        self._remarks: Counter[str] = Counter()
        self._answers: list[_Answer] = []
        self._wrote: dict[str | bytes, int] = {}
        self._until_s = 0.0

    @property
    def account(self) -> Account:
        """What was spent, and what went wrong."""
        told = [
            reason if count == 1 else f"{reason} ({count} times)"
            for reason, count in self._remarks.most_common(MOST_REMARKS)
        ]
        return Account(self._tokens, self._cost_usd, tuple(told))

    def propose(
        self, brief: Brief, parents: Sequence[Parent], n: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Return what one answer holds, at most n policies; an answer may hold none."""
        del rng
        self._until_s = time.monotonic() + brief.left_s
        self._seen.update(brief.known, (i.arm_id for i in brief.incumbents))
        wanted = min(self._policies, n)
        while self._barren < PATIENCE:
            asked = self._question(brief, parents, wanted)
            if asked is None:
                continue
            ask, reply = asked
            drafts = [(draft, text) for text in reply.texts for draft in drafts_in(text)][:n]
            if not drafts:
                cut = " before it was cut off" if any(reply.cut) else ""
                self._remark(f"{reply.model} answered without a policy{cut}.")
            proposals = [
                replace(self._checked(draft, text, reply, len(drafts)), prompt=_shown(ask.messages))
                for draft, text in drafts
            ]
            fresh = {p for p in map(_id_of, proposals) if p and p not in self._seen}
            self._seen |= fresh
            self._barren = 0 if fresh else self._barren + 1
            if self._barren >= PATIENCE:
                self._remark(f"{PATIENCE} answers in a row held nothing new.")
            if proposals:
                return proposals
        return []

    def learn(self, verdicts: Sequence[tuple[Proposal, CandidateRow]]) -> None:
        """Tell whoever chooses the models what each answer has gained."""
        gains: dict[int, float] = {}
        for proposal, row in verdicts:
            number = self._wrote.get(proposal.source)
            if number is not None and row.gain is not None and row.gate in RACED:
                gains[number] = max(gains.get(number, -np.inf), row.gain)
        self._correspondent.judged(
            [
                Verdict(a.model, gains.get(i), a.tokens, a.cost_usd)
                for i, a in enumerate(self._answers)
            ]
        )

    def _question(
        self, brief: Brief, parents: Sequence[Parent], wanted: int
    ) -> tuple[Ask, Reply] | None:
        """Ask for policies, in fewer words if they are too many; None if there is no answer."""
        each, choices = (1, wanted) if self._grammar else (wanted, 1)
        while True:
            messages = letter.request(brief, parents, each, self._most_bytes)
            ask = Ask(messages, choices, self._grammar)
            reply = self._ask(ask)
            if reply.fault is not Fault.TOO_LONG or self._most_bytes <= SHORTEST_PROMPT_BYTES:
                break
            length = sum(len(message.content.encode()) for message in messages)
            self._most_bytes = max(min(length, self._most_bytes) // 2, SHORTEST_PROMPT_BYTES)
        if reply.fault is None:
            self._answers.append(_Answer(reply.model, reply.tokens, reply.cost_usd))
            return ask, reply
        self._remark(reply.reason)
        self._barren = PATIENCE if reply.fault in FINAL else self._barren + 1
        return None

    def _checked(self, draft: Draft, answer: str, reply: Reply, drafts: int) -> Proposal:
        """Return the policy as it is, or as its author repairs it when the verifier refuses it.

        `answer` is the text in which it stands.
        """
        number = len(self._answers) - 1
        tokens, cost_usd = reply.tokens // drafts, reply.cost_usd / drafts
        source, thought = draft.source, draft.thought
        fault = _fault(source)
        if fault and self._barren < PATIENCE:
            messages = letter.repair(source, fault, self._most_bytes)
            mended = self._ask(Ask(messages, 1, reply.grammar, reply.model))
            answer = "\n\n".join([answer, f"[refused: {fault}]", *mended.texts])
            tokens, cost_usd = tokens + mended.tokens, cost_usd + mended.cost_usd
            self._answers[number].tokens += mended.tokens
            self._answers[number].cost_usd += mended.cost_usd
            if mended.fault:
                self._remark(mended.reason)
            found = [d for text in mended.texts for d in drafts_in(text)]
            if found:
                source = found[0].source
                thought = f"{thought or found[0].thought} (repaired: {fault})"
        self._wrote[source] = number
        return Proposal(
            source,
            self.origin,
            thought=thought,
            tokens=tokens,
            cost_usd=cost_usd,
            model=reply.model,
            answer=answer[:LONGEST_KEPT],
        )

    def _ask(self, ask: Ask) -> Reply:
        reply = self._correspondent.ask(ask, self._until_s - time.monotonic())
        self._tokens += reply.tokens
        self._cost_usd += reply.cost_usd
        return reply

    def _remark(self, reason: str) -> None:
        self._remarks[reason] += 1


def _fault(source: str) -> str:
    """Return why a source is no policy, empty if it is one."""
    try:
        fast, slow = parts_of(source)
        verify(fast)
        if slow:
            verify_slow(slow)
    except PolicyError as error:
        return str(error)
    return ""


def _shown(messages: Sequence[Message]) -> str:
    """Return messages as one text."""
    told = "\n\n".join(f"[{message.role}]\n{message.content.strip()}" for message in messages)
    return told[:LONGEST_KEPT]


def _id_of(proposal: Proposal) -> str:
    try:
        fast, slow = parts_of(proposal.source)
        return arm_id(verify(fast).id, verify_slow(slow).id if slow else "")
    except PolicyError:
        return ""
