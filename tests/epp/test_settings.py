"""Mistakes in the picker's configuration end it with code 2 and a sentence that names the setting."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from twinjet.cli import EXIT_USAGE, main
from twinjet.epp.settings import load
from twinjet.errors import ConfigError

ONE = '[replicas]\naddresses = ["127.0.0.1:1"]\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "replicas: set one of addresses, file, dns, kubernetes.service; none of them is set"),
        ('[replicas]\naddresses = ["127.0.0.1:1"]\ndns = "a:1"', "addresses and dns is set"),
        ('[replicas]\naddresses = ["localhost:1"]', "replicas.addresses.0: 'localhost:1' is not IP:PORT"),
        ('[replicas]\ndns = "name"', "replicas.dns"),
        (ONE + "adresses = []", "unknown setting replicas.adresses; did you mean 'addresses'?"),
        (ONE + "[pickin]\n", "unknown setting pickin; did you mean 'picking'?"),
        (ONE + "[index]\nblock_tokens = 48", "index.block_tokens: 48 is refused"),
        (
            ONE + "[shedding]\nmax_waiting = 9\nhard_waiting = 3",
            "shedding: hard_waiting is below max_waiting",
        ),
        (ONE + "[picking]\nreport_life_s = 0.5", "picking.report_life_s is below twice replicas.report_s"),
        (ONE + "[server]\nport = 70000", "server.port: 70000 is refused"),
        (ONE + '[tokenizers]\nm = "/nowhere"', "tokenizers.m: "),
    ],
)
def test_a_mistake_ends_with_code_2_and_names_the_setting(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "epp.toml"
    path.write_text(text)
    assert main(["epp", "--config", str(path)]) == EXIT_USAGE
    assert told in capsys.readouterr().err + caplog.text


def test_a_taken_port_ends_with_code_2(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["epp", "--replicas", "127.0.0.1:1", "--port", port]) == EXIT_USAGE
    assert port in caplog.text


def test_file_environment_and_flags_are_laid_over_each_other(tmp_path: Path) -> None:
    path = tmp_path / "epp.toml"
    path.write_text(ONE + "[server]\nport = 5\ngrace_s = 3\n")
    environ = {"TWINJET_SERVER__PORT": "6", "TWINJET_PICKING__FALLBACKS": "3"}
    config = load(path, {"server": {"port": 7}}, environ)
    assert (config.server.port, config.server.grace_s, config.picking.fallbacks) == (7, 3, 3)
    with pytest.raises(ConfigError, match="TWINJET_PICKING__FALBACKS"):
        load(path, {}, {"TWINJET_PICKING__FALBACKS": "1"})
