"""`twinjet doctor` finds what was planted, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines.factories import MODEL, double_installed
from twinjet.engines.tensorrt_llm import doctor, surface

PLANTED = "-LLM.generate_async.streaming +SamplingParams.novel ~KvCacheConfig.tokens_per_block"


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    report = json.loads(capsys.readouterr().out)
    return {line["check"]: (line["verdict"], line["seen"]) for line in report["lines"]}


def test_says_nothing_of_a_faithful_package(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor([]) == 0
    out = capsys.readouterr().out
    assert f"recorded contract of {version}" in out
    assert "as recorded names and signatures: no differences" in out
    assert "as recorded defaults: sampler_type 'auto', enable_iter_perf_stats False" in out
    assert ("no use_kv_cache_manager_v2" in out) == (version == "1.2")
    assert out.endswith("2 as recorded, 0 differ, 0 fail\n")


@pytest.mark.parametrize("recorded", ["1.2", "1.3"])
def test_reports_three_planted_differences(recorded: str, capsys: pytest.CaptureFixture[str]) -> None:
    with double_installed(recorded, PLANTED):
        assert doctor.run_doctor(["--json"]) == 1
    found = lines(capsys)
    assert found.pop("defaults")[0] == "as recorded"
    assert found == {
        "LLM.generate_async(streaming)": ("fails", "is missing"),
        "KvCacheConfig.tokens_per_block": ("differs", "has the default 'planted'; recorded: 32"),
        "SamplingParams.novel": ("differs", "is not recorded"),
    }


def test_a_lost_capability_does_not_break_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with double_installed("1.2", "-LLM.generate_async.cache_salt"):
        assert doctor.run_doctor([]) == 0
    assert "differs     LLM.generate_async(cache_salt): is missing; what needs it is refused" in (
        capsys.readouterr().out
    )


def test_compares_with_another_version_on_request(double: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor(["--recorded-version", "1.3"]) == 0
    assert "LLM.generate_async(priority): is missing" in capsys.readouterr().out


def test_without_the_package_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor([]) == 2
    assert "NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "recorded"),
    [("1.2.1", "1.2"), ("1.3.0rc24", "1.3"), ("1.4.0rc1", "1.3"), ("1.0.0", "1.2"), ("unknown", "1.2")],
)
def test_chooses_the_nearest_recorded_version(installed: str, recorded: str) -> None:
    assert surface.recorded_version(installed, surface.load_contract()) == recorded


def test_an_unknown_version_is_refused(double: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor(["--recorded-version", "0.9"]) == 2
    assert "known: 1.2, 1.3" in capsys.readouterr().err


def test_is_a_command(double: None, capsys: pytest.CaptureFixture[str]) -> None:
    from twinjet.cli import main

    assert main(["doctor"]) == 0
    assert "no differences" in capsys.readouterr().out


# ---- with a model ----


@pytest.mark.parametrize("native", ["true", "false"])
def test_a_live_trial_of_a_faithful_engine_finds_all_as_recorded(
    version: str, native: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--option", f"native_sampler={native}", "--option", "max_seq_len=4096"]
    assert doctor.run_doctor(["--json", "--model", str(MODEL), *options]) == 0
    found = lines(capsys)
    different = {
        check for check, (verdict, _) in found.items() if verdict not in ("as recorded", "not tried")
    }
    assert different == (set() if native == "true" else {"logits processor"})
    for check in (
        "start",
        "prompt",
        "stop",
        "abort",
        "prefix cache",
        "statistics",
        "KV events",
        "cache_salt",
    ):
        assert found[check][0] == "as recorded"
    assert found["own sampler: bad_words"][0] == "as recorded"
    assert found["prompt_logprobs beside the hook"][0] == ("as recorded" if native == "true" else "not tried")


@pytest.mark.parametrize("recorded", ["1.2", "1.3"])
def test_a_live_trial_finds_and_names_three_planted_deviations(
    recorded: str, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = {
        "1.2": "bad_words_ignored=off iterators_block=on",
        "1.3": "bad_words_ignored=on iterators_block=off",
    }
    with double_installed(recorded, f"{turned[recorded]} salt_ignored=on"):
        assert doctor.run_doctor(["--json", "--model", str(MODEL), "--option", "max_seq_len=4096"]) == 0
    different = {check: seen for check, (verdict, seen) in lines(capsys).items() if verdict == "differs"}
    assert set(different) == {"own sampler: bad_words", "statistics", "cache_salt"}
    assert "recorded: " in different["own sampler: bad_words"]
    assert "iterator" in different["statistics"]
    assert "under another salt" in different["cache_salt"]


def test_a_live_trial_tells_whether_ignored_end_tokens_are_added(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 258, "max_position_embeddings": 4096}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 97]}')
    assert doctor.run_doctor(["--json", "--model", str(tmp_path)]) == 0
    verdict, seen = lines(capsys)["end tokens"]
    assert verdict == "as recorded"
    assert ("are added" in seen) == (version == "1.3")


def test_an_engine_that_does_not_start_is_a_failure(
    double: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.run_doctor(["--json", "--model", str(tmp_path / "nothing")]) == 1
    assert lines(capsys)["start"][0] == "fails"


def test_a_wrong_option_is_refused(double: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor(["--model", str(MODEL), "--option", "max_seq_len"]) == 2
    assert "--option" in capsys.readouterr().err
