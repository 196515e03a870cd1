"""Which OpenMP library engine processes load, and how its threads wait."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from twinjet.engines.vllm.front import prestart, process

VARIABLES = ("LD_PRELOAD", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
INTEL, TORCH = Path("/i/libiomp5.so"), Path("/t/libgomp.so.1")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Both libraries are installed, and the environment says nothing of them."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prestart, "_intel_openmp", lambda: INTEL)
    monkeypatch.setattr(prestart, "_torch_openmp", lambda: TORCH)
    return monkeypatch


def chosen() -> dict[str, str]:
    return prestart.openmp_environment()


def test_intel_openmp_comes_first(libraries: pytest.MonkeyPatch) -> None:
    assert chosen() == {"LD_PRELOAD": str(INTEL), "KMP_BLOCKTIME": "1"}


def test_without_it_torch_openmp_spins_shortly(libraries: pytest.MonkeyPatch) -> None:
    libraries.setattr(prestart, "_intel_openmp", lambda: None)
    assert chosen() == {"LD_PRELOAD": str(TORCH), "GOMP_SPINCOUNT": "1000"}
    libraries.setattr(prestart, "_torch_openmp", lambda: None)
    assert chosen() == {"GOMP_SPINCOUNT": "1000"}


def test_other_preloads_are_kept(libraries: pytest.MonkeyPatch) -> None:
    libraries.setenv("LD_PRELOAD", "/m/libtcmalloc.so")
    assert chosen()["LD_PRELOAD"] == f"/m/libtcmalloc.so:{INTEL}"


@pytest.mark.parametrize("library", ["libgomp.so.1", "libiomp5.so", "libomp.so.5"])
def test_a_preloaded_openmp_is_left_alone(libraries: pytest.MonkeyPatch, library: str) -> None:
    libraries.setenv("LD_PRELOAD", f"/own/{library}")
    assert chosen() == {}


def test_waiting_set_by_the_user_is_kept(libraries: pytest.MonkeyPatch) -> None:
    libraries.setenv("KMP_BLOCKTIME", "0")
    assert chosen() == {"LD_PRELOAD": str(INTEL)}
    libraries.setattr(prestart, "_intel_openmp", lambda: None)
    libraries.setenv("OMP_WAIT_POLICY", "passive")
    assert chosen() == {"LD_PRELOAD": str(TORCH)}


def test_the_installed_libraries_are_found() -> None:
    for library in (prestart._intel_openmp(), prestart._torch_openmp()):
        assert library is None or library.is_file()


@pytest.mark.parametrize(
    ("threads", "problem"),
    [
        (["python3"], ""),
        (["python3", "cuda00001800007", "jemalloc_bg_thd"], ""),
        (["python3", "python3"], "it has 2 threads: python3, python3"),
    ],
)
def test_threads_that_a_fork_would_lose_speak_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: list[str], problem: str
) -> None:
    for number, name in enumerate(threads):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "comm").write_text(f"{name}\n")
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert process._problem(str(tmp_path)) == problem


def test_a_driver_that_was_initialised_before_the_fork_speaks_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "torch", None)
    driver = SimpleNamespace(cuInit=lambda flags: 3)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: driver)
    assert "CUDA driver" in process._problem(str(tmp_path))
    driver.cuInit = lambda flags: 100
    assert process._problem(str(tmp_path)) == ""
