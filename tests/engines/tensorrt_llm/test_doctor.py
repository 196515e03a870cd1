"""`twinjet doctor` finds what was planted, and nothing else."""

from __future__ import annotations

import json

import pytest

from tests.engines.factories import double_installed
from twinjet.engines.tensorrt_llm import doctor

PLANTED = "-LLM.generate_async.streaming +SamplingParams.novel ~KvCacheConfig.tokens_per_block"


def test_says_nothing_of_a_faithful_package(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor([]) == 0
    out = capsys.readouterr().out
    assert f"recorded contract of {version}" in out
    assert out.endswith("no differences\n")


@pytest.mark.parametrize("recorded", ["1.2", "1.3"])
def test_reports_three_planted_differences(recorded: str, capsys: pytest.CaptureFixture[str]) -> None:
    with double_installed(recorded, PLANTED):
        assert doctor.run_doctor(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(d["severity"], d["where"], d["what"]) for d in found] == [
        ("breaks", "LLM.generate_async(streaming)", "is missing"),
        ("differs", "KvCacheConfig.tokens_per_block", "has the default 'planted'; recorded: 32"),
        ("differs", "SamplingParams.novel", "is not recorded"),
    ]


def test_a_lost_capability_does_not_break_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with double_installed("1.2", "-LLM.generate_async.cache_salt"):
        assert doctor.run_doctor([]) == 0
    assert "limits   LLM.generate_async(cache_salt): is missing" in capsys.readouterr().out


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
    assert doctor.recorded_version(installed, doctor.load_contract()) == recorded


def test_an_unknown_version_is_refused(double: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor(["--recorded-version", "0.9"]) == 2
    assert "known: 1.2, 1.3" in capsys.readouterr().err


def test_is_a_command(double: None, capsys: pytest.CaptureFixture[str]) -> None:
    from twinjet.cli import main

    assert main(["doctor"]) == 0
    assert "no differences" in capsys.readouterr().out
