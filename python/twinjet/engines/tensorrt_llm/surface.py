"""Compares the surface of the installed tensorrt_llm, its names, fields and signatures, with the recorded contract.

It builds no engine and needs no model; what an engine does is twinjet.engines.tensorrt_llm.front.examination's.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from twinjet.engines.tensorrt_llm.front import features

Severity = Literal["breaks", "limits", "differs"]

# What the adapter cannot do without, and what it uses where it is there; the rest is recorded for people.
_VITAL = {
    "SamplingParams": features.NEEDED_FIELDS,
    "LLM.generate_async": features.NEEDED_KEYWORDS,
    "CompletionOutput": frozenset(
        {"token_ids", "logprobs", "prompt_logprobs", "finish_reason", "stop_reason"}
    ),
}
_USED = {
    "SamplingParams": frozenset(
        {
            "min_p", "seed", "min_tokens", "bad", "embedding_bias", "guided_decoding", "repetition_penalty",
            "frequency_penalty", "presence_penalty",
        }
    ),
    "LLM.generate_async": frozenset({"lora_request", "cache_salt", "priority", "disaggregated_params"}),
    "DisaggregatedParams": frozenset({"request_type", "first_gen_tokens", "ctx_request_id", "opaque_state"}),
    "TorchLlmArgs": frozenset(
        {
            "enable_iter_perf_stats", "num_postprocess_workers", "kv_cache_config", "scheduler_config",
            "max_num_tokens", "max_seq_len", "max_batch_size", "enable_chunked_prefill",
            "guided_decoding_backend", "speculative_config", "enable_lora",
        }
    ),
    "KvCacheConfig": frozenset(
        {"enable_block_reuse", "max_tokens", "tokens_per_block", "event_buffer_max_size"}
    ),
    "SchedulerConfig": frozenset({"capacity_scheduler_policy"}),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """severity: "breaks" stops the engine, "limits" takes a capability, "differs" is for people to judge."""

    severity: Severity
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.severity:8} {self.where}: {self.what}"


def load_contract() -> dict[str, Any]:
    """Read the contract that comes with the package."""
    text = resources.files("twinjet.engines.tensorrt_llm").joinpath("contract.json").read_text()
    contract: dict[str, Any] = json.loads(text)
    return contract


def recorded_version(installed: str, contract: Mapping[str, Any]) -> str:
    """Choose the recorded version to compare with: the newest one not newer than what is installed."""
    number = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    known: list[str] = list(contract["versions"])
    fitting = [v for v in known if tuple(map(int, v.split("."))) <= number]
    return fitting[-1] if fitting else known[0]


def differences(contract: Mapping[str, Any], version: str) -> list[Difference]:
    """List every difference between the installed package and the recorded version, the worst first."""
    found: list[Difference] = []
    for module, names in contract["exports"].items():
        found += [
            Difference("breaks", f"{module}.{name}", "is missing")
            for name in names
            if features.find([f"{module}:{name}"]) is None
        ]
    for name, recorded in contract["classes"].items():
        found += _compare_class(name, recorded, version)
    llm = features.find(["tensorrt_llm:LLM"])
    if llm is not None:
        found += _compare_methods(llm, contract, version)
    for name, recorded in contract["enums"].items():
        if _in_version(recorded, version):
            found += _compare_enum(name, recorded)
    for name, recorded in contract["errors"].items():
        if _in_version(recorded, version):
            found += _compare_error(name, recorded)
    order: list[Severity] = ["breaks", "limits", "differs"]
    return sorted(found, key=lambda d: (order.index(d.severity), d.where))


def _severity(owner: str, name: str) -> Severity:
    if name in _VITAL.get(owner, ()):
        return "breaks"
    return "limits" if name in _USED.get(owner, ()) else "differs"


def _in_version(entry: Mapping[str, Any], version: str) -> bool:
    return bool(entry.get("since", version) <= version <= entry.get("until", version))


def _compare_class(name: str, recorded: Mapping[str, Any], version: str) -> list[Difference]:
    cls = features.find([f"{recorded['module']}:{name}"])
    if cls is None:
        return [Difference("differs", f"{recorded['module']}.{name}", "is missing")]
    expected = {entry["name"]: entry for entry in recorded["fields"] if _in_version(entry, version)}
    actual = _field_defaults(cls)
    if actual is None:
        return [Difference("differs", name, "is neither a dataclass nor a pydantic model; not compared")]
    found = [
        Difference(_severity(name, field), f"{name}.{field}", "is missing")
        for field in expected.keys() - actual.keys()
    ]
    found += [
        Difference("differs", f"{name}.{field}", "is not recorded")
        for field in actual.keys() - expected.keys()
        if not field.startswith("_")
    ]
    for field in expected.keys() & actual.keys():
        found += _compare_default(f"{name}.{field}", expected[field], actual[field])
    return found


_REQUIRED = object()
_FACTORY = object()


def _field_defaults(cls: Any) -> dict[str, Any] | None:
    """Give fields and defaults of a dataclass or a pydantic model."""
    if dataclasses.is_dataclass(cls):
        return {
            f.name: f.default
            if f.default is not dataclasses.MISSING
            else _FACTORY
            if f.default_factory is not dataclasses.MISSING
            else _REQUIRED
            for f in dataclasses.fields(cls)
        }
    if hasattr(cls, "model_fields"):
        return {
            name: _REQUIRED
            if info.is_required()
            else _FACTORY
            if info.default_factory is not None
            else info.default
            for name, info in cls.model_fields.items()
        }
    return None


def _compare_default(where: str, expected: Mapping[str, Any], actual: Any) -> list[Difference]:
    if expected.get("required"):
        if actual is _REQUIRED:
            return []
        return [Difference("differs", where, f"has the default {_show(actual)}; recorded: required")]
    if actual is _REQUIRED:
        return [Difference("limits", where, "is required; recorded: it has a default")]
    if actual is _FACTORY or "factory" in expected:
        # What a factory makes is not compared: some need a GPU to run.
        return []
    if _plain(actual) == expected.get("default"):
        return []
    return [
        Difference(
            "differs", where, f"has the default {_show(actual)}; recorded: {_show(expected.get('default'))}"
        )
    ]


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, enum.Enum) else value


def _show(value: Any) -> str:
    if value is _FACTORY:
        return "made by a factory"
    return "required" if value is _REQUIRED else repr(_plain(value))


def _compare_methods(llm: Any, contract: Mapping[str, Any], version: str) -> list[Difference]:
    found: list[Difference] = []
    for function, versions in contract["functions"].items():
        owner, _, name = function.partition(".")
        if owner != "LLM" or version not in versions:
            continue
        method = getattr(llm, name, None)
        if method is None:
            found.append(Difference("limits", function, "is missing"))
            continue
        parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
        found += _compare_parameters(function, versions[version], parameters)
    init = [p for p in inspect.signature(llm.__init__).parameters.values() if p.name != "self"]
    found += _compare_parameters("LLM.__init__", contract["llm"]["init"], init)
    return found


def _compare_parameters(
    function: str, expected: Sequence[Mapping[str, Any]], actual: Sequence[inspect.Parameter]
) -> list[Difference]:
    recorded = {entry["name"]: entry for entry in expected}
    present = {p.name: p for p in actual if p.kind is not inspect.Parameter.VAR_KEYWORD}
    takes_any = len(present) < len(actual)
    found = [
        Difference(_severity(function, name), f"{function}({name})", "is missing")
        for name in recorded.keys() - present.keys()
        if not takes_any
    ]
    found += [
        Difference("differs", f"{function}({name})", "is not recorded")
        for name in present.keys() - recorded.keys()
    ]
    for name in recorded.keys() & present.keys():
        default = present[name].default
        found += _compare_default(
            f"{function}({name})",
            recorded[name],
            _REQUIRED if default is inspect.Parameter.empty else default,
        )
    shared = [entry["name"] for entry in expected if entry["name"] in present]
    if shared != [name for name in present if name in recorded]:
        found.append(Difference("differs", function, "takes its parameters in another order"))
    return found


def _compare_enum(name: str, recorded: Mapping[str, Any]) -> list[Difference]:
    cls = features.find([f"{recorded['module']}:{name}"])
    if cls is None:
        return [Difference("limits", name, "is missing")]
    return [
        Difference("limits", f"{name}.{member}", "is missing")
        for member in recorded["members"]
        if not hasattr(cls, member)
    ]


def _compare_error(name: str, recorded: Mapping[str, Any]) -> list[Difference]:
    cls = features.find([f"{recorded['module']}:{name}"])
    if cls is None or recorded["base"] in [base.__name__ for base in cls.__mro__]:
        return []
    return [Difference("limits", name, f"is no {recorded['base']}")]
