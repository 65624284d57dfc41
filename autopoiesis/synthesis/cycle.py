"""A brief in bytes to verdicts in bytes: what the worker does once it is confined."""

from dataclasses import asdict, replace
from pathlib import Path

import orjson

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.arms.sandbox.process import SandboxError
from autopoiesis.synthesis.archive import Archive
from autopoiesis.synthesis.brief import Brief, BriefError
from autopoiesis.synthesis.files import FilesProposer
from autopoiesis.synthesis.genetic import GeneticProposer
from autopoiesis.synthesis.llm.author import ModelAuthor
from autopoiesis.synthesis.llm.conversation import Correspondent
from autopoiesis.synthesis.llm.courier import Courier
from autopoiesis.synthesis.llm.exchange import Recording, Replayed
from autopoiesis.synthesis.probe import Probe
from autopoiesis.synthesis.proposer import Proposer
from autopoiesis.synthesis.race import Deadline
from autopoiesis.synthesis.step import step
from autopoiesis.synthesis.tuner import TuningProposer
from autopoiesis.twin.simulation import run_arm


def proposer_for(brief: Brief, correspondent: Correspondent | None = None) -> Proposer:
    """Return the proposer that the brief names; BriefError if it cannot be had.

    Language models are asked through the `correspondent`.
    """
    if brief.synthesizer is Origin.GENETIC:
        return GeneticProposer()
    if brief.synthesizer is Origin.TUNED:
        return TuningProposer()
    if brief.synthesizer is Origin.FILES:
        if not brief.folder:
            raise BriefError("The files proposer needs a folder; name one.")
        return FilesProposer(Path(brief.folder))
    if brief.synthesizer in {Origin.OPENAI, Origin.FLEET}:
        if correspondent is None:
            raise BriefError(
                f"The {brief.synthesizer} proposer needs somebody who speaks to the models; start the "
                "worker with a clerk or a recording."
            )
        held = (
            brief.synthesizer is Origin.FLEET and not brief.yards
        )  # the grammar has no slow functions
        return ModelAuthor(brief.synthesizer, correspondent, brief.policies_asked, grammar=held)
    raise BriefError(
        f"There is no proposer called {brief.synthesizer.value!r}; use genetic, openai, fleet or files."
    )


def answer_to(
    data: bytes, courier: Courier | None = None, recording: Recording | None = None
) -> bytes:
    """Run the cycle that a serialised brief asks for; return its SynthesisRow as JSON.

    Raises BriefError with one sentence if the brief cannot be worked on.
    """
    brief = Brief.from_bytes(data)
    proposer = proposer_for(brief, Replayed(recording) if recording else courier)
    try:
        load_kernels(brief)
        keeps = brief.archive and recording is None
        archive = Archive.open(Path(brief.archive)) if keeps else None
        deadline = Deadline(stops=recording.stops if recording else None)
        row = step(brief, proposer, archive=archive, deadline=deadline)
        if archive is not None:
            archive.save(Path(brief.archive))
            row = replace(row, conclusion=f"{row.conclusion} {archive.remark}".strip())
    except PolicyError as error:
        raise BriefError(f"An incumbent is no policy: {error}.") from None
    except SandboxError as error:
        raise BriefError(f"Slow functions cannot be judged here: {error}") from None
    if courier is not None:
        courier.ended(asdict(row), deadline.stops)
    return orjson.dumps(row)


def load_kernels(brief: Brief) -> None:
    """Load or compile the kernels before the clock starts: the first time on a machine takes long."""
    program = compile_policy(verify(brief.incumbents[0].source))
    run_arm(brief.windows[-1].head(2), brief.replicas, program, brief.objective, brief.seed)
    Probe(brief.replicas, brief.objective, brief.seed).decisions(program)
