"""Compares the installed tensorrt_llm with the contract that the engine was written against.

The first thing to run on a GPU machine: `twinjet doctor`, or `python -m twinjet.engines.tensorrt_llm.doctor`.
It reads signatures and fields only: it builds no engine and needs no model.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import inspect
import json
import sys
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
    "LLM.generate_async": frozenset({"lora_request", "cache_salt", "priority"}),
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
        found += _compare_enum(name, recorded)
    for name, recorded in contract["errors"].items():
        found += _compare_error(name, recorded)
    order: list[Severity] = ["breaks", "limits", "differs"]
    return sorted(found, key=lambda d: (order.index(d.severity), d.where))


def examine(version: str | None = None, *, as_json: bool = False) -> int:
    """Print what differs. version: the recorded one to compare with, None for the nearest.

    Returns 0 if nothing stops the engine, 1 if something does, 2 without the package or the version.
    """
    contract = load_contract()
    if version is not None and version not in contract["versions"]:
        known = ", ".join(contract["versions"])
        print(f"twinjet doctor: no version {version!r} is recorded; known: {known}", file=sys.stderr)
        return 2
    if not features.is_installed():
        print(f"twinjet doctor: {features.MISSING}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module("tensorrt_llm")
    except (ImportError, OSError, RuntimeError) as error:
        print(f"twinjet doctor: tensorrt_llm is installed but cannot be imported: {error}", file=sys.stderr)
        return 2
    installed = str(getattr(module, "__version__", "unknown"))
    version = version or recorded_version(installed, contract)
    found = differences(contract, version)
    if as_json:
        print(json.dumps([dataclasses.asdict(difference) for difference in found], indent=1))
    else:
        print(f"tensorrt_llm {installed} against the recorded contract of {version}")
        for difference in found:
            print(f"  {difference}")
        print(_verdict(found))
    return 1 if any(difference.severity == "breaks" for difference in found) else 0


def run_doctor(argv: Sequence[str] | None = None) -> int:
    """Do as the command line says; see examine."""
    parser = argparse.ArgumentParser(
        prog="twinjet doctor", description="compare the installed tensorrt_llm with the recorded contract"
    )
    parser.add_argument("--recorded-version", metavar="V", help="default: the nearest to what is there")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse_args(argv)
    return examine(options.recorded_version, as_json=options.json)


def _verdict(found: Sequence[Difference]) -> str:
    if not found:
        return "no differences"
    num = {s: sum(d.severity == s for d in found) for s in ("breaks", "limits", "differs")}
    return (
        f"{len(found)} differences: {num['breaks']} stop the engine, {num['limits']} limit what it can do, "
        f"{num['differs']} are for you to judge"
    )


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
        if owner != "LLM":
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


if __name__ == "__main__":
    sys.exit(run_doctor())
