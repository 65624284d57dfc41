"""How many characters a token of the fleet's model has, asked of a replica's own tokenizer.

Prompts are counted by characters: a tokenizer in their way would cost more than it tells. This ratio is where
counting starts; from then on it is learned from the `usage` of answers. What is tokenized is a text of ours,
never a client's.
"""

import aiohttp
import orjson

from autopoiesis.replicas.probe import ProbeError, probe

SAMPLE = """The harbour lies open to the west, and in winter the wind drives the swell against the mole for days.
Ships wait in the roads until it turns; their crews mend nets, write letters, and argue about the price of
coal. "You will see," the pilot says, "it clears by Thursday." On 14 March 1987 at 06:45 it did: 23 vessels
left within two hours, carrying 41,600 t of grain, timber and ore.

- Summarise the text above in one sentence.
- List every number in it as JSON: {"numbers": [14, 1987, 23, 41600]}

def departures(log: list[str], day: str) -> int:
    return sum(1 for line in log if line.startswith(day) and "left" in line)

for i, ship in enumerate(sorted(ships, key=lambda s: s.draught_m)):
    print(f"{i + 1:>3}. {ship.name:<24} {ship.draught_m:.2f} m")

Why does a wave break when the water becomes shallow? Explain it to a child of ten, then to an engineer, and
say which of the two explanations leaves something out.
"""
TIMEOUT_S = 5.0


async def chars_per_token(address: str) -> float | None:
    """Return the characters per token of a sample by the tokenizer at `host:port`; None if it offers none."""
    limit = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        server = await probe(f"http://{address}", TIMEOUT_S)
        body = {"model": server.models[0], "prompt": SAMPLE}
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.post(f"{server.url}/tokenize", json=body) as answer,
        ):
            count = int(orjson.loads(await answer.read())["count"])
    except (ProbeError, aiohttp.ClientError, OSError, ValueError, KeyError, TypeError):
        return None
    return len(SAMPLE) / count if count > 0 else None
