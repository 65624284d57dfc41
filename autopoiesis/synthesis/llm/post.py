"""From a question to its reply: choose whom to ask, reserve, send, try again, settle, record."""

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

from autopoiesis.arms.grammar import policy_grammar
from autopoiesis.synthesis.llm.choice import ModelChoice
from autopoiesis.synthesis.llm.conversation import Ask, Fault, Reply, Verdict
from autopoiesis.synthesis.llm.endpoint import Attempt, Endpoint
from autopoiesis.synthesis.llm.exchange import Recorder
from autopoiesis.synthesis.llm.ledger import BudgetError, Ledger, Spent
from autopoiesis.synthesis.llm.settings import LlmSettings

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 30.0
"""Wait before the second attempt, doubled before each further one."""
MESSAGE_TOKENS = 64
"""Most tokens that a chat template adds to a message."""

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


class NoAddresseeError(RuntimeError):
    """Nobody can be asked now; the fault and the message say why."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Addressee:
    """Who is asked."""

    endpoint: Endpoint
    model: str
    max_tokens: int
    """Longest answer."""
    extras: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further parameters, sent where the endpoint knows them."""


class AddressBook(Protocol):
    """Where addressees come from."""

    async def addressee(self, model: str, within_s: float) -> Addressee:
        """Return whom to ask, `model` if it is named. Raises NoAddresseeError."""
        ...

    async def unless_called_off(self, work: Awaitable[T]) -> T:
        """Wait for work to end; raise NoAddresseeError as soon as it has to stop."""
        ...

    async def close(self) -> None:
        """Hang up everywhere."""
        ...


class Models:
    """The models of one endpoint, chosen by what they gained for their price."""

    def __init__(self, settings: LlmSettings, key: str, choice: ModelChoice) -> None:
        self._settings = settings
        self._key = key
        self._choice = choice
        self._endpoint = Endpoint(settings.base_url, key, settings.timeout_s)

    async def addressee(self, model: str, within_s: float) -> Addressee:
        """Return the model named, or the most promising one."""
        del within_s
        s = self._settings
        if not s.models:
            raise NoAddresseeError(Fault.REFUSED, "no model is named; set llm.models.")
        if s.api_key_env and not self._key:
            raise NoAddresseeError(
                Fault.KEY,
                f"there is no key: set the variable {s.api_key_env}, or llm.api_key_env to the name of the "
                "one that holds it (empty if the endpoint wants no key).",
            )
        chosen = model if model in s.models else self._choice.choose()
        return Addressee(self._endpoint, chosen, s.max_tokens)

    async def unless_called_off(self, work: Awaitable[T]) -> T:
        """Wait for work to end; nothing calls it off."""
        return await work

    async def close(self) -> None:
        """Hang up."""
        await self._endpoint.close()


class Post:
    """Answers questions, one at a time, and keeps the books and the records."""

    def __init__(
        self,
        settings: LlmSettings,
        book: AddressBook,
        ledger: Ledger,
        choice: ModelChoice,
        recorder: Recorder,
        seed: int = 0,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._book = book
        self._ledger = ledger
        self._choice = choice
        self._recorder = recorder
        self._random = random.Random(seed)
        self._sleep = sleep

    async def ask(self, ask: Ask, within_s: float) -> Reply:
        """Put a question, with as many attempts as are allowed within the time; never raises."""
        began_s, at_s = time.monotonic(), time.time()
        attempts: list[Attempt] = []
        before = self._ledger.cycle
        try:
            self._recorder.check_room()
            addressee = await self._book.addressee(ask.model, within_s)
            asked = replace(ask, model=addressee.model)
            until_s = began_s + within_s
            while True:
                attempts.append(await self._attempt(asked, addressee, until_s - time.monotonic()))
                if not self._worth_another(attempts, until_s):
                    break
                await self._sleep(self._wait_s(attempts))
            reply = self._reply(asked, attempts)
        except NoAddresseeError as error:
            reply = Reply(fault=error.fault, reason=str(error))
        except BudgetError as error:
            reply = Reply(fault=Fault.BUDGET, reason=str(error))
        after = self._ledger.cycle
        reply = replace(reply, tokens=after.tokens - before.tokens, cost_usd=after.usd - before.usd)
        self._recorder.add(
            {
                "kind": "exchange",
                "at_s": at_s,
                "seconds": time.monotonic() - began_s,
                "ask": ask.as_dict(),
                "attempts": [_shown(attempt) for attempt in attempts],
                "reply": reply.as_dict(),
            }
        )
        return reply

    def judged(self, verdicts: Sequence[Verdict]) -> None:
        """Learn which models' answers gained something."""
        for verdict in verdicts:
            self._choice.answered(verdict.model, verdict.gain, verdict.tokens, verdict.cost_usd)
        self._choice.save()

    async def _attempt(self, ask: Ask, addressee: Addressee, left_s: float) -> Attempt:
        """Reserve, send and settle; raises BudgetError before anything is sent, NoAddresseeError."""
        if left_s <= 0.0:
            reason = "the cycle has no time left for an answer"
            return Attempt({}, 0.0, fault=Fault.LATE, reason=reason, billable=False)
        prompt_most = sum(len(m.content.encode()) + MESSAGE_TOKENS for m in ask.messages)
        tokens_most = prompt_most + addressee.max_tokens * ask.choices
        usd_most = self._settings.cost_usd(
            ask.model, prompt_most, addressee.max_tokens * ask.choices
        )
        most = Spent(tokens_most, usd_most)
        reservation = self._ledger.reserve(most)
        spent = most  # until we know better: whoever calls it off, it may have cost all of it
        try:
            attempt = await self._book.unless_called_off(
                addressee.endpoint.attempt(ask, self._parameters(ask, addressee), left_s)
            )
            spent = self._spent(ask.model, attempt, prompt_most, most)
        finally:
            with suppress(BudgetError):  # then the reservation stays in the books
                self._ledger.settle(reservation, most, spent)
        return attempt

    def _parameters(self, ask: Ask, addressee: Addressee) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "temperature": self._settings.temperature,
            "max_completion_tokens": addressee.max_tokens,
            **addressee.extras,
        }
        if ask.choices > 1:
            parameters["n"] = ask.choices
        if ask.grammar:
            parameters["structured_outputs"] = {"grammar": policy_grammar()}
        return parameters

    def _spent(self, model: str, attempt: Attempt, prompt_most: int, most: Spent) -> Spent:
        if not attempt.billable:
            return Spent()
        if not attempt.texts:
            return most
        prompt, answer = _tokens(attempt, prompt_most)
        return Spent(prompt + answer, self._settings.cost_usd(model, prompt, answer))

    def _worth_another(self, attempts: list[Attempt], until_s: float) -> bool:
        last = attempts[-1]
        if not last.again or len(attempts) >= self._settings.attempts:
            return False
        return time.monotonic() + (last.retry_after_s or 0.0) < until_s

    def _wait_s(self, attempts: list[Attempt]) -> float:
        """Return how long to wait: what the endpoint asks for, else longer from time to time."""
        asked_s = attempts[-1].retry_after_s
        if asked_s is not None:
            return asked_s
        backoff_s = min(FIRST_BACKOFF_S * 2.0 ** (len(attempts) - 1), LONGEST_BACKOFF_S)
        return backoff_s * self._random.uniform(0.5, 1.0)

    def _reply(self, ask: Ask, attempts: list[Attempt]) -> Reply:
        last = attempts[-1]
        prompt, answer = _tokens(last, 0)
        reason = last.reason
        if last.fault and len(attempts) > 1:
            reason += f" (attempt {len(attempts)})"
        if last.again and last.retry_after_s:
            reason += f"; it asks to wait {last.retry_after_s:.0f} s"
        return Reply(
            texts=last.texts if last.fault is None else (),
            cut=last.cut if last.fault is None else (),
            model=ask.model,
            grammar="structured_outputs" in last.parameters,
            prompt_tokens=prompt,
            answer_tokens=answer,
            counted=last.answer_tokens is not None,
            fault=last.fault,
            reason=f"{reason}." if reason else "",
        )


def _tokens(attempt: Attempt, prompt_most: int) -> tuple[int, int]:
    """Return prompt and answer tokens; where they were not counted, no text has more than its bytes."""
    answer_most = sum(len(text.encode()) for text in attempt.texts)
    prompt, answer = attempt.prompt_tokens, attempt.answer_tokens
    return prompt_most if prompt is None else prompt, answer_most if answer is None else answer


def _shown(attempt: Attempt) -> dict[str, Any]:
    """Return an attempt for the record: its texts stand in the reply, the grammar's hash is enough."""
    plain = asdict(attempt)
    del plain["texts"], plain["cut"]
    if "structured_outputs" in plain["parameters"]:
        digest = hashlib.sha256(policy_grammar().encode()).hexdigest()
        plain["parameters"] = {**plain["parameters"], "structured_outputs": f"sha256 {digest}"}
    return plain
