"""Structured-output campaign: sampled outputs of many schemas against jsonschema; every schema kept or refused by name.

    python bench/structured_output.py SUITE [--samples 20] [--json FILE]

SUITE: the folder tests/draft2020-12 of the JSON-Schema-Test-Suite (the source distribution of the Python package
jsonschema has it under json/). Outputs are drawn by random walks through the compiled grammar over the demo model's
vocabulary, without a model: that reaches more of a grammar than a model would. Prints a table by file.
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
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import numpy as np
from pydantic import BaseModel, Field, TypeAdapter

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.grammar.walker import Walker
from twinjet.grammar.schema import SchemaRefused
from twinjet.grammar.vocabulary import write_vocabulary
from twinjet.models.demo import demo_model


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
    args = parser.parse_args()
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(demo_model(lambda *_: None))
        vocabulary = write_vocabulary(tokenizer, vocab_size=49152, end_token_ids=(2,), folder=Path(folder))
        walker = Walker(vocabulary)
    table: dict[str, Counter[str]] = {}
    began = time.monotonic()
    for name, _, schema in suite(args.suite):
        table.setdefault(name, Counter()).update(run_case(walker, schema, args.samples))
    total: Counter[str] = sum(table.values(), Counter())
    print("| schemas | kept | refused by name | outputs checked | unfinished | silently broken |")
    print("|---|---|---|---|---|---|")
    for name, row in [*table.items(), ("all", total)]:
        cells = [row["kept"], row["refused"], row["samples"], row["unfinished"], row["broken"]]
        print(f"| {name} | {' | '.join(map(str, cells))} |")
    reasons = {k.removeprefix("refused."): v for k, v in total.items() if k.startswith("refused.")}
    print(f"\nrefused: {reasons}; {time.monotonic() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))
    sys.exit(1 if total["broken"] else 0)


if __name__ == "__main__":
    main()
