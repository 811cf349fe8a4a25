"""Fixtures of tests that refuse bad input."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path):
    import pico  # the shared helpers are loaded after this file

    path = tmp_path / "text.txt"
    path.write_text(pico.text(4000))
    return path


@pytest.fixture
def small(text, tmp_path):
    """Options of a conversion that takes a fraction of a second."""
    return ("--calib", text, "--eval", text, "--calib-samples", 8, "--calib-length", 32, "--eval-windows", 2,
            "--eval-length", 32, "--refine-steps", 0, "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip


@pytest.fixture
def source(sources, tmp_path):
    return Path(shutil.copytree(sources("llama"), tmp_path / "source"))


@pytest.fixture
def sharded(tmp_path):
    import pico
    from refusals import shards

    folder = pico.save("llama", tmp_path / "sharded", max_shard_size="60KB")
    assert len(shards(folder)) > 2
    return folder


@pytest.fixture
def refused(cli, tmp_path, small):
    """Assert that a conversion ends with an exit code and one line holding `culprit`, and leaves the folder as it was."""
    from refusals import assert_one_line, listing

    def check(code, culprit, source, *options):
        before = listing(tmp_path)
        assert_one_line(*cli(source, *small, *options), code, culprit)
        assert listing(tmp_path) == before

    return check
