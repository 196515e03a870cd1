"""The Python client of a Twinjet server: `AsyncClient` for asyncio, `Client` for everything else.

    with Client("localhost:50051") as client:
        print(client.chat("What is the capital of France?").text())
        for piece in client.generate("Once upon a time", Sampling(max_tokens=50)).pieces():
            print(piece, end="", flush=True)

Failures are exceptions below `TwinjetClientError`. A call that never began is tried again (see RetryPolicy); one
that has given its first event never is. Needs grpcio and protobuf alone, and nothing of the server.
"""

from twinjet.client._aio import AsyncClient, AsyncStream
from twinjet.client._answers import (
    Adapter,
    ComponentInfo,
    Drained,
    Embeddings,
    EngineInfo,
    KvCacheInfo,
    KvCleared,
    KvEvent,
    KvEvents,
    KvRemoved,
    KvStored,
    LoadingProgress,
    Model,
    ModelLimits,
    ModelLoad,
    TenantLoad,
    Tokens,
)
from twinjet.client._calls import BatchProgress, Metadata
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
    PartialOutput,
    PreconditionFailed,
    ServerFailure,
    StreamConsumed,
    TwinjetClientError,
    Unavailable,
    Violation,
)
from twinjet.client._events import (
    Completion,
    Delta,
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
    Usage,
)
from twinjet.client._requests import Constraint, Conversation, Message, Options, Prompt, Sampling
from twinjet.client._retry import RetryPolicy
from twinjet.client._routes import Mirror, Route, Routes
from twinjet.client._sync import Client, Stream

__all__ = [
    "AccessDenied",
    "Adapter",
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "BadRequest",
    "BatchProgress",
    "Cancelled",
    "Client",
    "Completion",
    "ComponentInfo",
    "Constraint",
    "Conversation",
    "DeadlinePassed",
    "Delta",
    "Drained",
    "Embeddings",
    "EngineInfo",
    "Event",
    "Finished",
    "IncompleteStream",
    "KvCacheInfo",
    "KvCleared",
    "KvEvent",
    "KvEvents",
    "KvRemoved",
    "KvStored",
    "LoadingProgress",
    "Logprob",
    "Message",
    "Metadata",
    "Mirror",
    "Model",
    "ModelLimits",
    "ModelLoad",
    "NotFound",
    "NotSupported",
    "Options",
    "Output",
    "Overloaded",
    "PartialOutput",
    "PreconditionFailed",
    "Prompt",
    "PromptLogprobs",
    "Queued",
    "RetryPolicy",
    "Route",
    "Routes",
    "Sampling",
    "ServerFailure",
    "Started",
    "Stream",
    "StreamConsumed",
    "Summary",
    "TenantLoad",
    "Timings",
    "TokenLogprobs",
    "Tokens",
    "TwinjetClientError",
    "Unavailable",
    "Usage",
    "Violation",
]
