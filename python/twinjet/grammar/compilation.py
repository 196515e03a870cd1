"""What a worker does with one job: check and normalise a constraint, compile it, try it; or check a finished text.

Runs in a worker process alone, under its limits. Nothing here can be trusted to end.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twinjet.grammar.effort import Effort
from twinjet.grammar.job import Job
from twinjet.grammar.limits import MAX_COMPILED_BYTES, MAX_RECOMPILED_S
from twinjet.grammar.schema import SchemaRefused, normalise, parse, validator
from twinjet.grammar.vocabulary import token_lengths, tokenizer_info

_QUICK_S = 0.1
"""Processor time of a compilation that takes no longer than reading what it makes: 3 MiB for any object."""
_MAX_RULES = 150
"""A compiled grammar grows with the square of its rules: that of an object with these takes 9 to 32 MiB."""
MAX_WHITESPACE = 16
"""Characters of white space between two parts of a JSON document: enough for an indented one."""
_TRIAL_STEPS = 48
_ATOM = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]', re.DOTALL)
"""A string or a set of characters in a written grammar."""
_ONE = r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|\\.|[^\\]"
_CHARACTER = re.compile(f"({_ONE})()", re.DOTALL)
_RANGE = re.compile(f"({_ONE})(?:-({_ONE}))?", re.DOTALL)
_MAX_STEP_S = 0.02


class ConstraintRefused(ValueError):
    """The constraint is wrong or too costly; the text is for the client."""


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether native code, or a library that was to be mapped, got no memory: neither raises MemoryError."""
    return "bad_alloc" in str(error) or "failed to map segment" in str(error)


def perform(job: Job) -> dict[str, Any]:
    """Do a job. Raises ConstraintRefused."""
    if job.kind == "verify":
        return {"is_valid": verify(job.value, job.text, is_exact=job.is_exact)}
    try:
        kind, text = written(job.kind, job.value, job.choices)
    except SchemaRefused as error:
        raise ConstraintRefused(str(error)) from None
    if not job.vocabulary:
        return {}
    return _compile(kind, text, job)


def written(kind: str, value: str, choices: Sequence[str]) -> tuple[str, str]:
    """Give a constraint as what xgrammar compiles: ("schema" | "regex" | "ebnf" | "structural_tag", text). Raises SchemaRefused."""
    match kind:
        case "json_schema":
            return "schema", json.dumps(normalise(value))
        case "json_object":
            return "schema", json.dumps({"type": "object", "additionalProperties": {}})
        case "choice":
            # JSON's escapes are a subset of GBNF's, but for those of surrogate pairs.
            return "ebnf", "root ::= " + " | ".join(
                json.dumps(choice, ensure_ascii=False) for choice in choices
            )
        case _:
            return kind, value


def compile_text(compiler: Any, kind: str, text: str, *, is_compact: bool) -> Any:
    """Compile what written() gave with an xgrammar GrammarCompiler; raises what that raises."""
    if kind == "schema" and is_compact:
        return compiler.compile_json_schema(text, any_whitespace=False, separators=(",", ":"))
    if kind == "schema":
        # Unbounded white space is what a small model fills its output with.
        return compiler.compile_json_schema(text, max_whitespace_cnt=MAX_WHITESPACE)
    if kind == "regex":
        return compiler.compile_regex(text)
    if kind == "structural_tag":
        return compiler.compile_structural_tag(text)
    return compiler.compile_grammar(text)


def _compile(kind: str, text: str, job: Job) -> dict[str, Any]:
    xgrammar = importlib.import_module("xgrammar")
    info = tokenizer_info(job.vocabulary)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    began = time.thread_time()
    try:
        compiled = compile_text(compiler, kind, text, is_compact=job.is_compact)
    except (RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            # Out of memory, which is a limit of ours and says nothing of the constraint.
            raise MemoryError from None
        raise ConstraintRefused(_reason(error)) from None
    took_s = time.thread_time() - began
    if kind != "schema":
        _check_characters(str(compiled.grammar))
    serialized = _serialized(compiled, took_s)
    _try(xgrammar, compiled, info, token_lengths(job.vocabulary))
    source = {"kind": kind, "text": text, "is_compact": job.is_compact}
    temporary = Path(f"{job.target}.{os.getpid()}")
    temporary.write_text(json.dumps(source) + "\n" + serialized)
    size = temporary.stat().st_size
    temporary.replace(job.target)
    return {"num_bytes": size}


def _check_characters(grammar: str) -> None:
    """Refuse what xgrammar takes for characters and no text can hold; [^\\ud800-\\udfff] and \\0-\\uffff are in order.

    grammar: as xgrammar writes it, with escapes in lower case. The bytes that it would make are shown as U+FFFD.
    """
    for atom in _ATOM.finditer(grammar):
        if atom[0].startswith("[^"):
            continue
        kind = _RANGE if atom[0][0] == "[" else _CHARACTER
        for first_one, last_one in kind.findall(atom[0][1:-1]):
            ends = first_one, last_one or first_one
            first, last = (int(end[2:], 16) if end[:2] in ("\\u", "\\U") else 0 for end in ends)
            if first >= 0xD800 and last <= 0xDFFF:
                raise ConstraintRefused("has half of a surrogate pair, which is no character")
            if first > sys.maxunicode:
                raise ConstraintRefused("has a character above U+10FFFF")


def _serialized(compiled: Any, took_s: float) -> str:
    """What the engine's process reads; "" where it compiles the text once more. took_s: what compiling took here."""
    if took_s <= _QUICK_S:
        return ""
    if str(compiled.grammar).count("\n") <= _MAX_RULES:
        serialized: str = compiled.serialize_json()
        if len(serialized) <= MAX_COMPILED_BYTES:
            return serialized
    if took_s > MAX_RECOMPILED_S:
        raise ConstraintRefused(
            f"takes more than {MAX_RECOMPILED_S:g} s to compile and more than {MAX_COMPILED_BYTES >> 20} MiB once "
            "compiled; make it smaller"
        )
    return ""


def _reason(error: Exception) -> str:
    """The compiler's own message without its clock, source file and repetition of the grammar."""
    if isinstance(error, UnicodeDecodeError):
        # Its message, cut in the middle of a character.
        return "is not a valid grammar"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else "not a valid grammar"
    if first.startswith("[") and "] " in first:
        first = first.split("] ", 1)[1]
    head, separator, tail = first.partition(": ")
    if separator and (".cc:" in head or ".h:" in head):
        first = tail
    first = re.sub(r"^Check failed: \(.*?\) is false: ", "", first)
    return first[:300]


def _try(xgrammar: Any, compiled: Any, info: Any, lengths: Any) -> None:
    """Walk through the grammar for some tokens: one that starts with nothing or takes long for a mask is refused.

    The engine makes a mask between any two steps, so a slow one would hold up every other request. What is slow after
    many characters shows with the longest tokens, what is slow after many tokens with the shortest. lengths: of the
    tokens, as token_lengths() gives them.
    """
    import numpy as np

    random = np.random.default_rng(0)
    ends = list({*info.stop_token_ids, *info.special_token_ids})
    choices: list[Callable[[Any], Any]] = [
        random.choice,
        lambda ids: ids[lengths[ids].argmax()],
        lambda ids: ids[lengths[ids].argmin()],
    ]
    for choose in choices:
        matcher = xgrammar.GrammarMatcher(compiled)
        bitmask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
        effort = Effort()
        num_slow = 0
        for step in range(_TRIAL_STEPS):
            began = time.thread_time()
            effort.allow_mask()
            with effort.counted():
                matcher.fill_next_token_bitmask(bitmask)
            bits = np.unpackbits(bitmask.numpy().view(np.uint8), bitorder="little")[: info.vocab_size]
            if step == 0 and not bits.any():
                raise ConstraintRefused("no token of this model can begin an output that satisfies it")
            bits[ends] = 0
            (ids,) = np.nonzero(bits)
            if not len(ids):
                break
            with effort.counted():
                is_accepted = matcher.accept_token(int(choose(ids)))
            num_slow = num_slow + 1 if time.thread_time() - began > _MAX_STEP_S else 0
            if num_slow >= 3 or effort.is_spent():
                raise ConstraintRefused(
                    "is too ambiguous: finding the tokens that may follow takes more than "
                    f"{_MAX_STEP_S * 1000:.0f} ms"
                )
            if not is_accepted or matcher.is_terminated():
                break


def verify(schema: str, text: str, *, is_exact: bool) -> bool:
    """Tell whether a finished text is JSON and satisfies the schema; also if that cannot be told."""
    made = parse(schema)
    try:
        if is_exact:
            value = json.loads(text)
        else:
            value, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except ValueError:
        return False
    try:
        return bool(validator(made).is_valid(value))
    except Exception:  # noqa: BLE001 - a pattern that Python's re cannot read, say
        return True
