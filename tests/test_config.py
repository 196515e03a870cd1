"""Settings from file, environment and flags; mistakes name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from twinjet import config
from twinjet.errors import ConfigError

MINIMAL = '[deployments.a]\nengine = "fake"\n'


def _load(
    tmp_path: Path, text: str, environ: dict[str, str] | None = None, **overrides: object
) -> config.Config:
    path = tmp_path / "twinjet.toml"
    path.write_text(text)
    return config.load(path, overrides, environ or {})


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    text = "[server]\nport = 1\nhost = 'file'\ngrace_s = 1\n" + MINIMAL
    environ = {"TWINJET_SERVER__PORT": "2", "TWINJET_SERVER__HOST": "environment"}
    loaded = _load(tmp_path, text, environ, server={"port": 3}).server
    assert (loaded.port, loaded.host, loaded.grace_s) == (3, "environment", 1)


def test_the_environment_reaches_every_depth(tmp_path: Path) -> None:
    environ = {"TWINJET_DEPLOYMENTS__A__OPTIONS__STEP_S": "0.5", "TWINJET_CACHE_DIR": "/elsewhere"}
    assert _load(tmp_path, MINIMAL, environ).deployments["a"].options == {"step_s": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1\n" + MINIMAL, "unknown setting server.prot; did you mean 'port'?"),
        ("[sever]\n" + MINIMAL, "unknown setting sever; did you mean 'server'?"),
        (MINIMAL + "modle = 'x'\n", "unknown setting deployments.a.modle; did you mean 'model'?"),
        ("[server]\nport = 99999\n" + MINIMAL, "server.port: "),
        ("[deployments.a]\nengine = 'gpt'\n", "deployments.a.engine: "),
        ("", "no deployment is configured"),
        (MINIMAL + "[routes.m]\nweights = { b = 1 }\n", "names deployment 'b', which does not exist"),
        ("[server]\ntls_cert = 'x'\n" + MINIMAL, "tls_cert and tls_key belong together"),
        ("[server\n", "is not valid TOML"),
    ],
)
def test_a_mistake_names_the_setting(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text)
    assert message in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(tmp_path / "none.toml", {}, {})


def test_without_routes_each_deployment_is_public_under_its_name(tmp_path: Path) -> None:
    assert list(_load(tmp_path, MINIMAL).public_routes()) == ["a"]
    routed = _load(tmp_path, MINIMAL + "[routes.m]\nweights = { a = 1 }\n")
    assert list(routed.public_routes()) == ["m"]


@pytest.mark.parametrize("path", sorted(Path("deploy/examples").glob("*.toml")), ids=lambda p: p.name)
def test_the_examples_load(path: Path) -> None:
    assert config.load(path, {}, {}).deployments


def test_the_documentation_names_every_setting() -> None:
    text = Path("docs/configuration.md").read_text()
    for section in (
        config.ServerSettings,
        config.AdminSettings,
        config.DeploymentSettings,
        config.RouteSettings,
        config.MirrorSettings,
    ):
        for name in section.model_fields:
            assert f"`{name}`" in text, name
