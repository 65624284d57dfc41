"""Streams that are sent to a gateway, and what it tells of its replicas."""

import json
import threading
from contextlib import contextmanager

import openai
from gateway_process import run

MESSAGES = [{"role": "user", "content": "Tell me of the sea, and of the ships on it."}]


class Load(threading.Thread):
    """Streams requests one after another until told to stop; notes how each ended."""

    def __init__(self, url, tokens=60):
        super().__init__(daemon=True)
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=120)
        self.tokens = tokens
        self.done = threading.Event()
        self.whole, self.cut, self.refused = 0, 0, []

    def run(self):
        while not self.done.is_set():
            began = False
            try:
                for chunk in self.client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=self.tokens, stream=True,
                    extra_body={"ignore_eos": True},
                ):  # fmt: skip
                    began = began or bool(chunk.choices and chunk.choices[0].delta.content)
                self.whole += 1
            except (openai.APIError, OSError) as error:
                if began:
                    self.cut += 1
                else:
                    self.refused.append(str(error))


@contextmanager
def under_load(fleet, streams=6):
    """Keep so many streams going; whatever happens, they are at their end afterwards."""
    loads = [Load(fleet.url) for _ in range(streams)]
    for load in loads:
        load.start()
    try:
        yield loads
    finally:
        for load in loads:
            load.done.set()
        for load in loads:
            load.join(60)


def ended(loads):
    """Return how many streams came whole and were cut, and what was said of those that never began."""
    return (
        sum(x.whole for x in loads),
        sum(x.cut for x in loads),
        [r for x in loads for r in x.refused],
    )


def told(fleet):
    code, out, errors = run("control", "fleet", "--json", "-", cwd=fleet.folder)
    assert 0 == code, errors
    return {r["replica"]: r for r in json.loads(out)}


def rows(fleet, query):
    code, out, errors = run("sql", "--format", "json", query, cwd=fleet.folder)
    assert 0 == code, errors
    return json.loads(out)
