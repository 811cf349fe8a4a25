"""Shared fixtures. Nothing here or in any test reaches a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker inherits what its parent set; more threads than cores spin
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The kernel tests interpret Triton, which asks for it when it is first imported, by whichever test that may be.
os.environ.setdefault("TRITON_INTERPRET", "1")

import functools
import gc
import hashlib
import importlib.util
import pickle
import sys
from importlib import metadata
from pathlib import Path

import pytest
from filelock import FileLock


def pytest_configure(config):
    """Give each worker of `-n` a contiguous half of the tests, so that it loads a parametrised fixture's model once.

    The process that starts the workers runs no test, and leaves out what imports torch and transformers.
    """
    if getattr(config.option, "dist", None) == "load":
        config.option.dist = "worksteal"
    if not getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        for name in ("pico", "fake_hub", "mutate", "refusals", "uses"):
            _load(name)


def pytest_collection_finish():
    """Leave a million objects of torch and transformers out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_report_header():
    """Say which versions the tests meet: the newest transformers of the index is not pinned."""
    return [f"{name} {metadata.version(name)}" for name in ("torch", "transformers")]


def _load(name: str) -> None:
    # importlib import mode leaves sys.path alone, so the shared helpers are loaded by their files
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder for results that the workers of one run share: base.parent under xdist, the base folder else."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def sources(shared_folder):
    """name -> folder of that pico checkpoint, made once a run. Tests copy it before they change it."""
    import pico

    def get(name: str) -> Path:
        place = shared_folder / name
        with FileLock(f"{place}.lock"):
            if not place.exists():
                pico.save(name, place.with_suffix(".new") / "source")
                place.with_suffix(".new").rename(place)
        return place / "source"

    return get


@pytest.fixture(scope="session", autouse=True)
def suite_tokens():
    """Tokenise the packaged suite once a worker for each tokenizer."""
    import pico

    with pico.suite_tokens_kept():
        yield


@pytest.fixture(scope="session")
def convert_folder(tmp_path_factory):
    """Convert the checkpoint in a folder that `pico.save` wrote, with its small text."""
    import pico

    def run(folder: Path, **settings):
        out = settings.pop("out", None) or tmp_path_factory.mktemp("out") / folder.name
        return pico.convert(folder, out, **settings)

    return run


@pytest.fixture(scope="session")
def convert_pico(sources, shared_folder):
    """Convert a pico checkpoint; a conversion with equal settings is made once a run. Tests copy it before they change it."""
    import pico

    def run(name: str, **settings):
        key = hashlib.sha256(repr((name, sorted(settings.items()))).encode()).hexdigest()[:16]
        place = shared_folder / f"{name}-{key}"
        with FileLock(f"{place}.lock"):
            if not (place / "report.pickle").exists():
                report = pico.convert(sources(name), place / "source", **settings)
                (place / "report.pickle").write_bytes(pickle.dumps(report))
        return pickle.loads((place / "report.pickle").read_bytes())

    return run


@pytest.fixture
def hub(monkeypatch):
    """A fake Hub that huggingface_hub's own client in this process talks to, logged in."""
    import fake_hub
    from huggingface_hub import constants

    import mla_convert.publish.hub_errors

    with fake_hub.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not an open one
        monkeypatch.setattr(mla_convert.publish.hub_errors, "WAIT", 0.01)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield server


@functools.cache
def _command():
    """The command line, which typer would build again for every call."""
    from typer.main import get_command

    from mla_convert.cli.main import app

    return get_command(app)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process: arguments -> (exit code, stdout, stderr)."""
    from mla_convert.cli.main import main

    monkeypatch.setattr("mla_convert.cli.main.app", _command())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mla-convert", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run
