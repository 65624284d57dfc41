"""A brief in bytes to verdicts in bytes: what the worker does once it is confined."""

from dataclasses import replace
from pathlib import Path

import orjson

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.synthesis.archive import Archive
from autopoiesis.synthesis.brief import Brief, BriefError
from autopoiesis.synthesis.files import FilesProposer
from autopoiesis.synthesis.genetic import GeneticProposer
from autopoiesis.synthesis.probe import Probe
from autopoiesis.synthesis.proposer import Proposer
from autopoiesis.synthesis.step import step
from autopoiesis.synthesis.tuner import TuningProposer
from autopoiesis.twin.simulation import run_arm


def proposer_for(brief: Brief) -> Proposer:
    """Return the proposer that the brief names; BriefError if there is none of that name."""
    if brief.synthesizer is Origin.GENETIC:
        return GeneticProposer()
    if brief.synthesizer is Origin.TUNED:
        return TuningProposer()
    if brief.synthesizer is Origin.FILES:
        if not brief.folder:
            raise BriefError("The files proposer needs a folder; name one.")
        return FilesProposer(Path(brief.folder))
    raise BriefError(
        f"There is no proposer called {brief.synthesizer.value!r}; use genetic or files."
    )


def answer_to(data: bytes) -> bytes:
    """Run the cycle that a serialised brief asks for; return its SynthesisRow as JSON.

    Raises BriefError with one sentence if the brief cannot be worked on.
    """
    brief = Brief.from_bytes(data)
    proposer = proposer_for(brief)
    try:
        load_kernels(brief)
        archive = Archive.open(Path(brief.archive)) if brief.archive else None
        row = step(brief, proposer, archive=archive)
        if archive is not None:
            archive.save(Path(brief.archive))
            row = replace(row, conclusion=f"{row.conclusion} {archive.remark}".strip())
        return orjson.dumps(row)
    except PolicyError as error:
        raise BriefError(f"An incumbent is no policy: {error}.") from None


def load_kernels(brief: Brief) -> None:
    """Load or compile the kernels before the clock starts: the first time on a machine takes long."""
    program = compile_policy(verify(brief.incumbents[0].source))
    run_arm(brief.windows[-1].head(2), brief.replicas, program, brief.objective, brief.seed)
    Probe(brief.replicas, brief.objective, brief.seed).decisions(program)
