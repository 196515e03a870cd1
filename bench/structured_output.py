"""Structured-output campaign: sampled outputs of many schemas against jsonschema; every schema kept or refused by name.

    python bench/structured_output.py SUITE [--samples 20] [--json FILE] [--engine [--seconds 300]]

SUITE: the folder tests/draft2020-12 of the JSON-Schema-Test-Suite (the source distribution of the Python package
jsonschema has it under json/). Outputs are drawn by random walks through the compiled grammar over the demo model's
vocabulary, without a model: that reaches more of a grammar than a model would. Prints a table by file.

With --engine they come from a server with the demo model on vLLM, whose own check of finished outputs is off: half of
a schema's outputs at temperature 1, half with a leaning towards what closes strings, objects and arrays. One that has
not ended after 64 tokens counts as unfinished. --json then is also read, so that --seconds at a time can be run.
"""

from __future__ import annotations

import argparse
import enum
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import grpc
import jsonschema
import numpy as np
from pydantic import BaseModel, Field, TypeAdapter

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.grammar.walker import Walker
from tests.server.processes import server
from twinjet.grammar.schema import SchemaRefused
from twinjet.grammar.vocabulary import write_vocabulary
from twinjet.models.demo import demo_model
from twinjet.v1 import generation_pb2, sampling_pb2, service_pb2_grpc, tokenization_pb2


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Base(BaseModel):
    """An item."""

    id: int = Field(ge=1, le=9999)
    name: str = Field(min_length=1, max_length=20)


class Priced(Base):
    price: float = Field(gt=0, le=1000)
    colour: Colour = Colour.RED
    tags: list[str] = Field(default_factory=list, max_length=3)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    breed: str | None = None


class Owner(BaseModel):
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = Field(max_length=3)
    code: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{3,5}$")]
    contact: str | int | None


class Tree(BaseModel):
    value: int
    children: list[Tree] = Field(default_factory=list, max_length=2)


class Person(BaseModel):
    best_friend: Person | None = None
    scores: dict[str, int]
    place: tuple[float, float]


class Order(BaseModel):
    items: list[Priced] = Field(min_length=1, max_length=2)
    owner: Owner
    note: Annotated[str, Field(pattern="^[a-z ]*$", max_length=30)] | None = None


PYDANTIC: list[Any] = [
    Base, Priced, Cat, Dog, Owner, Tree, Person, Order, list[Tree], dict[str, Cat | None], Cat | Dog | int,
    tuple[int, str, bool], Literal["a", 1, None], set[Literal["x", "y", "z"]], set[str], Colour | float,
]  # fmt: skip


def suite(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """File, description and schema of every case."""
    for path in sorted(folder.rglob("*.json")):
        for case in json.loads(path.read_text()):
            yield str(path.relative_to(folder)), case["description"], case["schema"]
    for kind in PYDANTIC:
        yield "pydantic models", str(kind), TypeAdapter(kind).json_schema()


def run_case(walker: Walker, schema: Any, num_samples: int) -> Counter[str]:
    """Count what became of a schema and of its samples."""
    try:
        compiled = walker.compile("json_schema", json.dumps(schema))
    except SchemaRefused as error:
        return Counter({"refused": 1, f"refused.{error.keyword}": 1})
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    checker, found = kind(schema), Counter({"kept": 1})
    random = np.random.default_rng(1)
    for _ in range(num_samples):
        text = walker.walk(compiled, random)
        found["samples" if text is not None else "unfinished"] += 1
        if text is not None and not _is_valid(checker, text):
            found["broken"] = 1
            print("BROKEN", json.dumps(schema), text, file=sys.stderr)
    return found


SETTINGS = """[grammar]
verify = false
refused_cpu_s = 86400

[deployments.smollm2]
engine = "vllm"
model = "demo"
"""
MAX_TOKENS = 64
LEANING = 6.0


class Sampler:
    """Draws outputs of a server's model."""

    def __init__(self, address: str) -> None:
        channel = grpc.insecure_channel(address)
        self._inference = service_pb2_grpc.InferenceServiceStub(channel)
        self._closers = {
            self._token(text): LEANING for text in ('"', "}", "]", '"}', '"]', "}}", "]}", '":', "},", '",')
        }

    def _token(self, text: str) -> int:
        """The first token of a text, which is the whole of one that is a token."""
        request = tokenization_pb2.TokenizeRequest(text=text, add_special_tokens=False)
        return int(self._inference.Tokenize(request).token_ids[0])

    def run(self, schema: Any, num_samples: int) -> Counter[str]:
        """Count what became of a schema and of its samples."""
        found: Counter[str] = Counter()
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        checker = kind(schema)
        for leaning in (self._closers, {}):
            try:
                outputs = self._draw(schema, num_samples // 2, leaning)
            except grpc.RpcError as error:
                code, why = error.code().name, error.details() or ""
                if code == "INVALID_ARGUMENT":
                    return Counter({"refused": 1, f"refused.{_keyword(why)}": 1})
                found[f"failed.{code}"] += 1
                print(code, why, json.dumps(schema), file=sys.stderr)
                continue
            found["kept"] = 1
            for text, reason in outputs:
                is_whole = reason == generation_pb2.FINISH_REASON_STOP
                found["samples" if is_whole else "unfinished"] += 1
                if is_whole and not _is_valid(checker, text):
                    found["broken"] = 1
                    print("BROKEN", json.dumps(schema), text, file=sys.stderr)
        return found

    def _draw(self, schema: Any, num_outputs: int, leaning: dict[int, float]) -> list[tuple[str, int]]:
        sampling = sampling_pb2.SamplingParams(
            constraint=sampling_pb2.Constraint(json_schema=json.dumps(schema)),
            n=num_outputs,
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            logit_bias=leaning,
        )
        request = generation_pb2.GenerateRequest(text="An example as JSON:\n", sampling=sampling)
        texts, reasons = [""] * num_outputs, [0] * num_outputs
        for event in self._inference.Generate(request, timeout=120):
            if event.HasField("delta"):
                texts[event.delta.output_index] += event.delta.text
            elif event.HasField("finished"):
                reasons[event.finished.output_index] = event.finished.reason
        return list(zip(texts, reasons, strict=True))


def _keyword(details: str) -> str:
    """The keyword that a refusal names: "sampling.constraint.json_schema: KEYWORD at PLACE: WHY"."""
    return details.partition("json_schema: ")[2].partition(" at ")[0].partition(":")[0][:40]


def with_engine(cases: list[tuple[str, str, Any]], known: dict[str, Any], args: argparse.Namespace) -> None:
    """Go on with cases that are not known yet, for args.seconds; known: by number."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), SETTINGS) as (process, address):
        sampler, until = Sampler(address), time.monotonic() + args.seconds
        left = [number for number in range(len(cases)) if str(number) not in known]

        def run(number: int) -> None:
            if time.monotonic() < until:
                known[str(number)] = sampler.run(cases[number][2], args.samples)

        # A few at once, so that one is compiled while another is drawn.
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(run, left))
        assert process.poll() is None, "the server died"
    if args.json:
        args.json.write_text(json.dumps(known))


def _is_valid(checker: Any, text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return bool(checker.is_valid(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--seconds", type=float, default=86_400.0)
    args = parser.parse_args()
    table: dict[str, Counter[str]] = {}
    began = time.monotonic()
    cases = list(suite(args.suite))
    if args.engine:
        known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
        with_engine(cases, known, args)
        for number, (name, _, _) in enumerate(cases):
            table.setdefault(name, Counter()).update(known.get(str(number), {"missing": 1}))
    else:
        walks(cases, table, args)
    total: Counter[str] = sum(table.values(), Counter())
    print("| schemas | kept | refused by name | outputs checked | unfinished | silently broken |")
    print("|---|---|---|---|---|---|")
    for name, row in [*table.items(), ("all", total)]:
        cells = [row["kept"], row["refused"], row["samples"], row["unfinished"], row["broken"]]
        print(f"| {name} | {' | '.join(map(str, cells))} |")
    others = {k: v for k, v in total.items() if k == "missing" or k.startswith("failed.")}
    reasons = {k.removeprefix("refused."): v for k, v in total.items() if k.startswith("refused.")}
    print(f"\nrefused: {reasons}; neither: {others}; {time.monotonic() - began:.0f} s")
    if args.json and not args.engine:
        args.json.write_text(json.dumps(table, indent=1))
    sys.exit(1 if total["broken"] else 0)


def walks(
    cases: list[tuple[str, str, Any]], table: dict[str, Counter[str]], args: argparse.Namespace
) -> None:
    """Fill the table from random walks."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(demo_model(lambda *_: None))
        vocabulary = write_vocabulary(tokenizer, vocab_size=49152, end_token_ids=(2,), folder=Path(folder))
        walker = Walker(vocabulary)
    for name, _, schema in cases:
        table.setdefault(name, Counter()).update(run_case(walker, schema, args.samples))


if __name__ == "__main__":
    main()
