"""Dynamo's front end and its TensorRT-LLM sidecar as processes, as its packages have them, in front of a server of ours."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".cache" / "dynamo" / "bin" / "python"
START_S = 120.0
ANSWER_S = 60.0


def require() -> None:
    """Skip the test where Dynamo is not installed; in CI that is a failure."""
    if (ROOT / ".cache" / "dynamo" / "made").is_file():
        return
    message = "Dynamo is not installed in .cache/dynamo; deploy/dynamo_venv.sh installs it"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def write_model(folder: Path) -> Path:
    """Write what Dynamo reads of a model: bytes as tokens, 256 to end and 257 to begin with, and a chat template."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelt = {b: chr(b if b in plain else 256 + b - sum(p < b for p in plain)) for b in range(256)}
    special = {
        i: {
            "id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False,
        }
        for i, text in ((256, "<eos>"), (257, "<bos>"))
    }  # fmt: skip
    bytes_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {spelt[b]: b for b in range(256)} | {"<eos>": 256, "<bos>": 257}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": list(special.values()),
        "normalizer": None, "pre_tokenizer": bytes_level, "post_processor": None, "decoder": bytes_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": [],
        },
    }  # fmt: skip
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": "<bos>",
            "chat_template": template,
        },
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 258, "hidden_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 4096, "eos_token_id": 256,
            "bos_token_id": 257,
        },
        "generation_config.json": {"eos_token_id": 256},
    }  # fmt: skip
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


class Dynamo:
    """A running front end. model: as its clients name it."""

    def __init__(self, port: int, model: str, logs: Path) -> None:
        self._port = port
        self._logs = logs
        self.model = model

    async def chat(self, content: str, **fields: Any) -> tuple[int, Any]:
        """One chat completion, not streamed: HTTP status and body."""
        return await asyncio.to_thread(self._post, content, fields)

    async def stream(self, content: str, most: int = 1 << 30, **fields: Any) -> list[Any]:
        """The chunks of a streamed completion; leaves after so many of them by closing the connection."""
        return await asyncio.to_thread(self._stream, content, most, fields)

    async def until_listed(self) -> None:
        """Wait until the sidecar has told the front end of the model."""
        async with asyncio.timeout(START_S):
            while self.model not in await asyncio.to_thread(self._listed):
                await asyncio.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(self._logs.glob("*.log")))

    def _open(
        self, path: str, body: Any = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)
        headers = {"content-type": "application/json"}
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        return connection, connection.getresponse()

    def _listed(self) -> list[str]:
        try:
            connection, response = self._open("/v1/models")
        except OSError:
            return []
        with contextlib.closing(connection):
            return [m["id"] for m in json.loads(response.read()).get("data", [])]

    def _post(self, content: str, fields: Any) -> tuple[int, Any]:
        connection, response = self._open("/v1/chat/completions", self._body(content, fields))
        with contextlib.closing(connection):
            return response.status, json.loads(response.read())

    def _stream(self, content: str, most: int, fields: Any) -> list[Any]:
        body = self._body(content, fields) | {"stream": True}
        connection, response = self._open("/v1/chat/completions", body)
        chunks: list[Any] = []
        with contextlib.closing(connection):
            assert response.status == 200, response.read()
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]" or len(chunks) == most:
                    break
                if data.startswith("{"):
                    chunks.append(json.loads(data))
        return chunks

    def _body(self, content: str, fields: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **fields}


@contextlib.contextmanager
def _process(log: IO[str], environment: dict[str, str], *arguments: str) -> Iterator[None]:
    process = subprocess.Popen(
        [str(PYTHON), "-m", *arguments], stdout=log, stderr=log, env=environment, cwd=Path(log.name).parent
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def running(address: str, model: Path, folder: Path) -> AsyncIterator[Dynamo]:
    """Run front end and sidecar over the server at an address until the model is listed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "discovery").mkdir()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "PYTHON"))}
    environment = own | {
        "DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(folder / "discovery"), "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq", "DYN_TCP_RPC_HOST": "127.0.0.1", "HF_HUB_OFFLINE": "1",
        # How long a worker whose engine was away is passed over.
        "DYN_RUNTIME_INHIBITED_DURATION_SECS": "1",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, arguments in {
            "front": ("dynamo.frontend", "--http-port", str(port)),
            "sidecar": ("dynamo.trtllm.sidecar", "--grpc-endpoint", address, "--model-path", str(model)),
        }.items():
            log = stack.enter_context((folder / f"{name}.log").open("w"))
            stack.enter_context(_process(log, environment, *arguments))
        dynamo = Dynamo(port, str(model), folder)
        try:
            await dynamo.until_listed()
        except TimeoutError:
            raise AssertionError(f"the model is not listed:\n{dynamo.logs()}") from None
        yield dynamo
