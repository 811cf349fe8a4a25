"""`refresh` gives an earlier version's folder this version's files, whole or not at all, and nothing else."""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest

from mla_convert.core import sums
from mla_convert.core.errors import InputError, ResourceError, UsageError
from mla_convert.core.runtime import newest_tried
from mla_convert.core.sums import SUMS, CorruptCheckpoint
from mla_convert.modeling.shipped_code import code_files
from mla_convert.pipeline.refresh import refresh
from mla_convert.publish.engines.export import export
from mla_convert.write import revise
from mla_convert.write.selfcheck import SelfCheckFailed
from mla_convert.write.verify import verify

INPUT, USAGE = 4, 2
module = importlib.import_module("mla_convert.pipeline.refresh")
WEIGHTS = "*.safetensors"


@pytest.fixture
def folder(convert_pico, tmp_path):
    return shutil.copytree(convert_pico("llama", rank=10, rope_dim=6).out, tmp_path / "converted")


@pytest.fixture
def old(folder):
    """As an earlier version wrote it: other code, no SHA256SUMS, code of the source's named by its tokenizer."""
    (folder / SUMS).unlink()
    (folder / "modeling_mla.py").write_text("# as it was\n")
    content = json.loads((folder / "report.json").read_text())
    content["versions"]["mla_convert"] = "0.1.0"
    content["of_somebody"] = {"else": [1, None]}
    (folder / "report.json").write_text(json.dumps(content))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["x.Y", None]}})
    )
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_earlier_folder(old):
    before = contents(old)
    found = refresh(old)
    after = contents(old)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {*found.written} and {"modeling_mla.py", "tokenizer_config.json", "report.json", SUMS} <= changed
    assert not changed & {path.name for path in old.glob(WEIGHTS)} and "config.json" not in changed
    assert after["modeling_mla.py"] == code_files()["modeling_mla.py"]
    assert "auto_map" not in json.loads(after["tokenizer_config.json"])
    report = json.loads(after["report.json"])
    assert report["of_somebody"] == {"else": [1, None]} and report["versions"]["mla_convert"] == "0.1.0"
    assert sums.written_by(report) >= sums.SINCE
    assert verify(old).note is None
    (old / SUMS).unlink()
    with pytest.raises(CorruptCheckpoint, match="SHA256SUMS is missing"):
        verify(old)


def test_nothing_to_do(folder, cli):
    before = contents(folder)
    assert refresh(folder).written == []
    code, out, err = cli("refresh", folder)
    assert code == 0 and out.count("\n") == 1 and "nothing to do" in out and not err
    assert contents(folder) == before


def test_command(old, cli):
    code, out, err = cli("refresh", old, "--json")
    assert code == 0 and "modeling_mla.py" in json.loads(out)["written"] and not err
    assert cli("verify", old)[0] == 0
    assert not [path for path in old.parent.iterdir() if path.name.startswith(".")]


def test_damage_is_not_laundered(old, cli):
    shard = sorted(old.glob(WEIGHTS))[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    before = contents(old)
    code, out, err = cli("refresh", old)
    assert code == INPUT and shard.name in err and len(err.splitlines()) == 1 and not out
    assert contents(old) == before


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer_evil.py", "tokenizer.pkl", ".hidden"])
def test_what_is_no_part_of_it_is_named(old, name):
    (old / name).write_text("x")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        refresh(old)
    assert (old / name).exists()


def test_link_to_something_outside(old, tmp_path):
    (tmp_path / "secret").write_text("x")
    (old / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="outside"):
        refresh(old)


def test_changed_on_purpose(folder, cli):
    (folder / "README.md").write_text("# mine\n")
    assert cli("verify", folder)[0] == INPUT
    assert cli("refresh", folder)[0] == INPUT
    code, _out, err = cli("refresh", folder, "--accept", "README.md")
    assert code == 0 and not err
    assert (folder / "README.md").read_text() == "# mine\n" and cli("verify", folder)[0] == 0
    for name in ("report.json", "config.json", "nothing.md", "../x", "LICENSE"):
        with pytest.raises(UsageError, match="--accept"):
            refresh(folder, [name])


def test_python_files_that_are_missing_or_changed(folder, cli):
    before = contents(folder)
    for name in ("stock_mla.py", "modeling_mla.py"):
        (folder / name).unlink()
    code, out, err = cli("refresh", folder)
    assert code == 0 and not err and "stock_mla.py" in out
    assert contents(folder).keys() == before.keys() and cli("verify", folder)[0] == 0
    (folder / "stock_mla.py").write_text("# mine\n")
    code, _, err = cli("refresh", folder)
    assert code == INPUT and "--accept stock_mla.py replaces it" in err and err.count("\n") == 1
    assert (folder / "stock_mla.py").read_text() == "# mine\n"
    assert cli("refresh", folder, "--accept", "stock_mla.py")[0] == 0
    assert (folder / "stock_mla.py").read_bytes() == before["stock_mla.py"] and cli("verify", folder)[0] == 0


def test_the_refreshed_folder_is_tried_before_it_takes_the_place_of_the_old_one(old, monkeypatch):
    seen, check = [], module.self_check

    def watched(staged):
        seen.append((staged != old, (staged / "modeling_mla.py").read_bytes() == code_files()["modeling_mla.py"]))
        return check(staged)

    monkeypatch.setattr(module, "self_check", watched)
    refresh(old)
    assert seen == [(True, True)]
    assert json.loads((old / "report.json").read_text())["self_check"]["passed"]
    assert json.loads((old / "config.json").read_text())["mla_transformers"] == newest_tried()


def test_self_check_that_fails_leaves_the_old_folder(old, monkeypatch):
    before = contents(old)

    def check(staged):
        raise SelfCheckFailed("it talks nonsense")

    monkeypatch.setattr(module, "self_check", check)
    with pytest.raises(SelfCheckFailed, match="nonsense"):
        refresh(old)
    assert contents(old) == before and [path.name for path in old.parent.iterdir()] == ["converted"]


def test_weights_are_not_copied(old):
    inodes = {path.name: path.stat().st_ino for path in old.glob(WEIGHTS)}
    refresh(old)
    assert inodes == {path.name: path.stat().st_ino for path in old.glob(WEIGHTS)}


def test_without_hard_links(old, monkeypatch):
    def refuse(*names, **options):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    refresh(old)
    verify(old)


@pytest.mark.parametrize("profile", ["hf-code", "portable"])
def test_export(convert_pico, tmp_path, profile):
    source = convert_pico("llama", rank=10, rope_dim=8, rope_selection="engine_table").out
    out = tmp_path / "out"
    export(source, out, profile)
    assert refresh(out).written == []
    facts = json.loads((out / "export.json").read_text())
    facts["versions"]["mla_convert"] = "0.1.0"
    (out / "export.json").write_text(json.dumps(facts))
    (out / SUMS).unlink()
    assert "refresh" in verify(out).note
    if profile == "hf-code":
        (out / "modeling_mla_served.py").write_text("# old")
    refresh(out)
    assert verify(out).note is None
    assert profile == "portable" or (out / "modeling_mla_served.py").read_bytes() in code_files(exported=True).values()


def test_from_inside(old, monkeypatch):
    monkeypatch.chdir(old)
    with pytest.raises(InputError, match="outside"):
        refresh(Path("."))


def test_two_at_once(old):
    with revise.locked(old), pytest.raises(ResourceError, match="another"):
        refresh(old)


def test_not_a_folder(cli, tmp_path):
    code, _, err = cli("refresh", tmp_path / "nowhere")
    assert code == INPUT and len(err.splitlines()) == 1
    code, _out, err = cli("refresh", tmp_path)
    assert code == INPUT and "report.json is missing" in err


def test_a_folder_is_never_gone(old, monkeypatch):
    """Where two names cannot be exchanged, what was put aside comes back."""
    import mla_convert.core.files as files

    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    refresh(old)
    verify(old)
    old.rename(files.aside(old))  # killed between two renames
    assert refresh(old).written == []
    verify(old)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [None, "[]", '{"a":', b"\xff"])
def test_damage_that_no_checksum_tells(old, cli, name, content):
    (old / name).unlink()
    if content is not None:
        (old / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in ("refresh", "verify"):
        code, out, err = cli(command, old, "-q")
        assert code == 4 and len(err.splitlines()) == 1 and not out, err


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_an_older_folder_whose_index_is_damaged_is_bad_input(old, content):
    index = old / "model.safetensors.index.json"
    index.unlink() if content is None else index.write_text(content)
    before = contents(old)
    with pytest.raises(InputError, match=r"index"):
        refresh(old)
    assert contents(old) == before
