"""Sides of a comparison over gRPC: a public model name at an address."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import fields

from twinjet.client import (
    AsyncClient,
    Constraint,
    Delta,
    Finished,
    Options,
    RetryPolicy,
    Sampling,
    Started,
)
from twinjet.compare.driver import Arrived
from twinjet.compare.records import TokenChances
from twinjet.compare.workload import WorkItem
from twinjet.errors import ConfigError
from twinjet.request import SamplingOverrides


def parse_side(text: str, default_address: str) -> tuple[str, str]:
    """Split "MODEL" or "HOST:PORT/MODEL" into address and model. Raises ConfigError."""
    address, slash, model = text.rpartition("/")
    if not slash:
        return default_address, text
    if ":" not in address:
        # A model's own name may hold a slash.
        return default_address, text
    if not model:
        raise ConfigError(f"{text!r} names no model; write HOST:PORT/MODEL")
    return address, model


class ClientTarget:
    """A model of a server. Nothing is tried again: a refusal is a result."""

    def __init__(self, name: str, client: AsyncClient, model: str) -> None:
        self.name = name
        self._client = client
        self._model = model

    async def run(
        self, item: WorkItem, sampling: SamplingOverrides, cache_salt: str
    ) -> AsyncGenerator[Arrived, None]:
        """See driver.Target."""
        async with self._client.generate(
            item.prompt, _for_client(sampling), model=self._model, options=Options(cache_salt=cache_salt)
        ) as stream:
            async for event in stream:
                match event:
                    case Delta():
                        chances = [
                            TokenChances(t.chosen.logprob, tuple((r.token_id, r.logprob) for r in t.top))
                            for t in event.logprobs
                        ]
                        yield Arrived(event.token_ids, text=event.text, chances=chances)
                    case Started():
                        yield Arrived(deployment=event.deployment, num_prompt_tokens=event.prompt_tokens)
                    case Finished():
                        yield Arrived(reason=event.reason)


def _for_client(sampling: SamplingOverrides) -> Sampling:
    values = {f.name: getattr(sampling, f.name) for f in fields(sampling)}
    if (constraint := sampling.constraint) is not None:
        values["constraint"] = Constraint(constraint.kind, constraint.value, constraint.choices)
    return Sampling(**values)


def connect(address: str, token: str = "") -> AsyncClient:
    """Open a client that tries nothing again."""
    return AsyncClient(address, token=token, retry=RetryPolicy(attempts=1))
