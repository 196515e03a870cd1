"""The Python client of a Twinjet server: `AsyncClient` for asyncio, `Client` for everything else.

    with Client("localhost:50051") as client:
        print(client.chat("What is the capital of France?").text())
        for piece in client.generate("Once upon a time", Sampling(max_tokens=50)).pieces():
            print(piece, end="", flush=True)

Failures are exceptions below `TwinjetClientError`. A call that never began is tried again (see RetryPolicy); one
that has given its first event never is.
"""

from twinjet.client._aio import AsyncClient, AsyncStream
from twinjet.client._errors import (
    AccessDenied,
    AlreadyExists,
    BadRequest,
    Cancelled,
    DeadlinePassed,
    IncompleteStream,
    NotFound,
    NotSupported,
    Overloaded,
    ServerFailure,
    TwinjetClientError,
    Unavailable,
)
from twinjet.client._events import (
    Completion,
    Delta,
    Embeddings,
    Event,
    Finished,
    Logprob,
    Output,
    PromptLogprobs,
    Queued,
    Started,
    Summary,
    Timings,
    TokenLogprobs,
    Tokens,
    Usage,
)
from twinjet.client._requests import Message, Options
from twinjet.client._retry import RetryPolicy
from twinjet.client._sync import Client, Stream
from twinjet.request import Constraint
from twinjet.request import SamplingOverrides as Sampling

__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "BadRequest",
    "Cancelled",
    "Client",
    "Completion",
    "Constraint",
    "DeadlinePassed",
    "Delta",
    "Embeddings",
    "Event",
    "Finished",
    "IncompleteStream",
    "Logprob",
    "Message",
    "NotFound",
    "NotSupported",
    "Options",
    "Output",
    "Overloaded",
    "PromptLogprobs",
    "Queued",
    "RetryPolicy",
    "Sampling",
    "ServerFailure",
    "Started",
    "Stream",
    "Summary",
    "Timings",
    "TokenLogprobs",
    "Tokens",
    "TwinjetClientError",
    "Unavailable",
    "Usage",
]
