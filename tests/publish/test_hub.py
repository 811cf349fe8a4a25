"""`push` to a Hub on loopback by huggingface_hub's client: the uploaded files, private data, and failures."""

import json
import re
import shutil
from pathlib import Path

import fake_hub
import pytest
from fake_hub import Fault
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download

from mla_convert.core.errors import InputError
from mla_convert.core.progress import Progress
from mla_convert.core.sums import seal
from mla_convert.publish import hub as hub_module
from mla_convert.publish.hub import check_private, push
from mla_convert.write.verify import verify

USAGE, GATE, INPUT, RESOURCE = 2, 3, 4, 5
REPO = "me/tiny-mla"
QUIET = Progress(quiet=True)


@pytest.fixture
def folder(convert_pico, tmp_path):
    return shutil.copytree(convert_pico("llama", rank=10, rope_dim=6).out, tmp_path / "tiny-mla")


def assert_refused(result, code, *words):
    found, out, err = result
    assert found == code, err
    line = err.splitlines()[-1]
    assert line.startswith("mla-convert: ") and all(word in line for word in words), line
    assert not out


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ---- what arrives


def test_what_arrives_is_the_folder(hub, folder, tmp_path):
    (folder / ".gitattributes").write_text("what git puts there")
    done = push(folder, REPO, progress=QUIET)
    assert not hub.repos[REPO].private and done.url == f"{hub.url}/{REPO}" and done.revision == "main"
    there = hub.files(REPO)
    expected = {path.name for path in folder.iterdir()} - {".gitattributes"}
    assert set(there) - {".gitattributes"} == expected == set(done.files)
    assert {"report.html", "report.json", "recipe.yaml", "model.safetensors.index.json", "modeling_mla.py"} <= expected
    for file in expected - {"README.md", "SHA256SUMS"}:
        assert there[file] == (folder / file).read_bytes(), file
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in there["README.md"].decode()
    assert hub.repos[REPO].messages == ["initial commit", "source with Multi-head Latent Attention, rank 10 + 6 rotary"]
    assert verify(Path(snapshot_download(REPO, cache_dir=tmp_path / "cache"))).shards == 5


def test_weights_go_as_large_files_and_small_files_with_the_commit(hub, folder):
    push(folder, REPO, progress=QUIET)
    stored = [request for request in hub.requests if request.startswith("PUT /lfs/")]
    assert len(stored) == 6  # five shards and the tokenizer
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_pushing_again_changes_nothing(hub, folder):
    first = push(folder, REPO, progress=QUIET)
    sent = len(hub.large)
    assert push(folder, REPO, progress=QUIET).commit == first.commit and len(hub.large) == sent
    assert len(hub.repos[REPO].messages) == 2


def test_weights_of_an_earlier_conversion_go(hub, folder):
    hub.make(REPO)
    hub.files(REPO).update(
        {"model-00009-of-00009.safetensors": b"old", "extra/model.safetensors": b"kept", "a.txt": b"kept"}
    )
    done = push(folder, REPO, progress=QUIET)
    assert done.deleted == ["model-00009-of-00009.safetensors"]
    assert "model-00009-of-00009.safetensors" not in hub.files(REPO)
    assert {"extra/model.safetensors", "a.txt"} <= hub.files(REPO).keys()


def test_command(hub, folder, cli):
    code, out, err = cli("push", folder, REPO, "--commit-message", "As asked")
    assert code == 0 and f"{hub.url}/{REPO}" in out and "uploading" in err
    assert hub.repos[REPO].messages[-1] == "As asked"
    code, out, err = cli("push", folder, "my-org/other", "--private", "--json", "--quiet")
    assert code == 0 and not err
    found = json.loads(out)
    assert found["private"] and hub.repos["my-org/other"].private and found["repo"] == "my-org/other"
    assert "config.json" in found["files"] and found["pull_request"] is None


def test_branch(hub, folder, cli):
    code, out, _ = cli("push", folder, REPO, "--revision", "rank-10")
    assert code == 0 and out.rstrip().endswith(f"{REPO}/tree/rank-10")
    assert "config.json" in hub.files(REPO, "rank-10") and "config.json" not in hub.files(REPO)
    assert cli("push", folder, REPO, "--revision", "rank-10")[0] == 0


def test_pull_request_to_somebody_elses_repository(hub, folder, cli):
    hub.make("somebody/theirs")
    code, out, _ = cli("push", folder, "somebody/theirs", "--create-pr", "--json", "-q")
    found = json.loads(out)
    assert code == 0 and found["pull_request"] == found["url"] == f"{hub.url}/somebody/theirs/discussions/1"
    assert found["revision"] == "refs/pr/1"
    assert "config.json" in hub.files("somebody/theirs", "refs/pr/1")
    assert "config.json" not in hub.files("somebody/theirs")


def test_card(hub, folder, tmp_path):
    push(folder, REPO, progress=QUIET)
    card = ModelCard.load(hf_hub_download(REPO, "README.md", cache_dir=tmp_path))
    data = card.data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation" and "mla" in data.tags
    assert data.license == "unknown" and "look it up" in card.text
    assert data.base_model is None  # a local folder has no name on the Hub
    assert [result.metric_type for result in data.eval_results] == ["perplexity"] * 2
    assert data.to_dict()["model-index"][0]["results"]
    for words in ("## Load", "## Limits", "## Licence", "KV cache at 32k context", "perplexity"):
        assert words in card.text


# ---- what never arrives


@pytest.mark.parametrize(
    "file, text",
    [(file, text) for file in ("README.md", "recipe.yaml", "report.json", "report.html")
     for text in ("/home/somebody/models", "C:\\\\Users\\\\Somebody\\\\x", "file:///srv/x", "HERE", "TOKEN", "hf_" + "A" * 34)]
    + [("tokenizer_config.json", text) for text in ("HERE", "TOKEN", "hf_" + "A" * 34)],
)  # fmt: skip
def test_private_things_are_refused(hub, folder, cli, file, text):
    text = {"HERE": str(folder), "TOKEN": fake_hub.TOKEN}.get(text, text)
    if file.endswith(".json"):
        content = json.loads((folder / file).read_text())
        content["extra"] = text.replace("\\\\", "\\")
        (folder / file).write_text(json.dumps(content))
    else:
        (folder / file).write_text((folder / file).read_text() + f"\n# {text}\n")
    seal(folder)
    result = cli("push", folder, REPO, "-q")
    assert_refused(result, INPUT, file, "token" if "hf_" in text else "local path")
    assert not hub.requests and fake_hub.TOKEN not in result[2]


def test_what_a_source_says_is_public_already(hub, folder):
    (folder / "chat_template.jinja").write_text("You are an agent. Work in /home/user/project.")
    seal(folder)
    assert "chat_template.jinja" in push(folder, REPO, progress=QUIET).files


def test_user_name_in_a_path_is_refused(folder, monkeypatch):
    monkeypatch.setenv("LOGNAME", "someone")
    (folder / "README.md").write_text("see /srv/someone/models")
    with pytest.raises(InputError, match="your user name"):
        check_private(folder, ["README.md"])


def test_nothing_private_is_uploaded(hub, folder, monkeypatch):
    """No request body contains a path of this machine, a user name in a path, or a token."""
    monkeypatch.setenv("LOGNAME", "someone")
    push(folder, REPO, progress=QUIET)
    sent = b"\n".join([*hub.bodies, *hub.files(REPO).values()])
    for private in (str(folder), str(folder.parent), "/someone/", fake_hub.TOKEN):
        assert private.encode() not in sent
    text = b"\n".join(
        content for file, content in hub.files(REPO).items() if not file.endswith((".safetensors", "tokenizer.json"))
    )
    assert not re.search(rb"/home/\w|/Users/\w|/root/\w|hf_\w{30}", text)


def test_a_source_tokenizer_that_names_a_path_is_cleaned(sources, convert_folder, tmp_path):
    source = shutil.copytree(sources("llama"), tmp_path / "named" / "source")
    shutil.copy(sources("llama").parent / "text.txt", source.parent)
    change_json(source / "tokenizer_config.json", name_or_path="/home/author/llama", tokenizer_file=None)
    out = convert_folder(source).out
    assert "name_or_path" not in json.loads((out / "tokenizer_config.json").read_text())


# ---- what is refused before anything is sent


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint.bin", ".secret", "evil.py"])
def test_what_is_no_part_of_the_conversion(hub, folder, cli, name):
    (folder / name).write_text("x")
    assert_refused(cli("push", folder, REPO, "-q"), INPUT, name)
    assert not hub.requests


def test_what_was_changed(hub, folder, cli):
    (folder / "modeling_mla.py").write_text((folder / "modeling_mla.py").read_text() + "# planted\n")
    assert_refused(cli("push", folder, REPO, "-q"), INPUT, "modeling_mla.py")
    assert not hub.requests


def test_folder_of_an_earlier_version(hub, folder, cli):
    """Only the files of that version are uploaded; a note says that the others were not checked."""
    report = json.loads((folder / "report.json").read_text())
    report["versions"]["mla_convert"] = "0.1.0"
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "SHA256SUMS").unlink()
    (folder / "tokenizer_evil.py").write_text("x")
    (folder / "notes.txt").write_text("x")
    code, out, err = cli("push", folder, REPO, "--json")
    assert code == 0 and "only its shards are under checksum" in " ".join(err.split())
    assert not {"tokenizer_evil.py", "notes.txt"} & set(json.loads(out)["files"]) and "tokenizer.json" in out


@pytest.mark.parametrize("name", ["a/b/c", "me/", "bad name", "me/ä", "just-a-name"])
def test_impossible_names(hub, folder, cli, name):
    assert_refused(cli("push", folder, name), USAGE, name)
    assert not hub.requests


@pytest.mark.parametrize("missing", ["report.json", "README.md", "recipe.yaml", "modeling_mla.py", "config.json"])
def test_unfinished_conversion(hub, folder, cli, missing):
    (folder / missing).unlink()
    assert_refused(cli("push", folder, REPO, "-q"), INPUT, missing)
    assert not hub.requests


def test_damaged_shard(hub, folder, cli):
    shard = sorted(folder.glob("*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert_refused(cli("push", folder, REPO, "-q"), INPUT, shard.name)
    assert not hub.requests


def test_ordinary_checkpoint_and_no_folder(hub, sources, cli, tmp_path):
    assert_refused(cli("push", sources("llama"), REPO, "-q"), INPUT, "not a finished conversion")
    assert_refused(cli("push", tmp_path / "nowhere", REPO, "-q"), INPUT, "nowhere")
    assert not hub.requests


def test_gate(hub, folder, cli):
    code, out, err = cli("push", folder, REPO, "-q", "--from-report", "--min-kv-saving", "49%")
    assert code == 0 and "KV cache saved" in out and REPO in hub.repos
    sent = len(hub.requests)
    code, out, err = cli("push", folder, "me/other", "-q", "--from-report", "--min-kv-saving", "90%")
    assert code == GATE and err.splitlines()[-1].startswith("mla-convert: nothing was pushed: 1 of 1 gates failed")
    assert len(hub.requests) == sent and "me/other" not in hub.repos


def test_measured_gate(hub, folder, cli, sources):
    options = ("--against", sources("llama"), "--eval", sources("llama").parent / "text.txt", "--device", "cpu", "-q")
    assert cli("push", folder, REPO, "--max-ppl-ratio", "1000", *options)[0] == 0
    assert cli("push", folder, REPO, "--max-ppl-ratio", "0.001", *options)[0] == GATE


def test_gate_options_need_a_limit(hub, folder, cli):
    assert_refused(cli("push", folder, REPO, "--from-report"), USAGE, "give a limit")


# ---- what the Hub refuses


def test_no_token(hub, folder, cli, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert_refused(cli("push", folder, REPO, "-q"), INPUT, "hf auth login")


def test_wrong_token(hub, folder, cli, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert_refused(cli("push", folder, REPO, "-q"), INPUT, "401", REPO)
    assert not hub.repos


def test_somebody_elses(hub, folder, cli):
    assert_refused(cli("push", folder, "somebody/new", "-q"), INPUT, "403", "somebody/new")
    hub.make("somebody/theirs")
    assert_refused(cli("push", folder, "somebody/theirs", "-q"), INPUT, "403", "--create-pr")


def test_pull_request_to_nowhere(hub, folder, cli):
    assert_refused(cli("push", folder, "somebody/nothing", "--create-pr", "-q"), INPUT, "404", "somebody/nothing")


def test_conflict(hub, folder, cli):
    hub.faults = [Fault("/commit/", 409)]
    assert_refused(cli("push", folder, REPO, "-q"), INPUT, "409", "conflict")


def test_private_asked_for_a_public_repository(hub, folder, cli):
    hub.make(REPO)
    assert_refused(cli("push", folder, REPO, "--private", "-q"), INPUT, "public")
    assert "config.json" not in hub.files(REPO)


@pytest.mark.parametrize("status, code", [(500, RESOURCE), (503, RESOURCE), (402, RESOURCE), (400, INPUT)])
def test_other_answers(hub, folder, cli, status, code):
    hub.faults = [Fault("/api/repos/create", status, times=99)]
    assert_refused(cli("push", folder, REPO, "-q"), code, str(status))


def test_unreachable(hub, folder, cli, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert_refused(cli("push", folder, REPO, "-q"), RESOURCE, "cannot be reached")


def test_offline(hub, folder, cli, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(cli("push", folder, REPO, "-q"), RESOURCE, "offline")


@pytest.mark.parametrize("request_, what", [("/api/repos/create", "drop"), ("/api/repos/create", "lose"), ("/commit/", "drop"),
                                            ("/commit/", "lose"), ("/commit/", 503), ("PUT /lfs/", "drop")])  # fmt: skip
def test_broken_connections_are_tried_again(hub, folder, request_, what):
    hub.faults = [Fault(request_, what)]
    done = push(folder, REPO, progress=QUIET)
    assert hub.repos[REPO].messages[1:] == [hub_module.commit_message(folder)]  # once
    assert done.commit == hub.repos[REPO].branches["main"][0]
    assert hub.files(REPO)["config.json"] == (folder / "config.json").read_bytes()


def test_connection_that_stays_broken(hub, folder, cli):
    hub.faults = [Fault("/commit/", "drop", times=99)]
    assert_refused(cli("push", folder, REPO, "-q"), RESOURCE, "cannot be reached")


# ---- from convert


def small(source, out):
    text = source.parent / "text.txt"
    return (source, "--calib", text, "--eval", text, "--calib-samples", 8, "--calib-length", 32, "--eval-windows", 2,
            "--eval-length", 32, "--refine-steps", 0, "--device", "cpu", "--out", out, "-q")  # fmt: skip


def test_convert_and_push(hub, sources, cli, tmp_path):
    code, out, err = cli(*small(sources("llama"), tmp_path / "out"), "--push-to-hub", REPO, "--private", "--json")
    assert code == 0 and json.loads(out)["out"] == str(tmp_path / "out")
    assert f"{hub.url}/{REPO}" in err and hub.repos[REPO].private
    assert hub.files(REPO)["config.json"] == (tmp_path / "out" / "config.json").read_bytes()


def test_convert_asks_for_the_token_first(hub, sources, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = cli(*small(sources("llama"), tmp_path / "out"), "--push-to-hub", REPO)
    assert_refused(result, INPUT, "401")
    assert not (tmp_path / "out").exists()


def test_conversion_is_kept_when_its_push_fails(hub, sources, cli, tmp_path):
    hub.faults = [Fault("/commit/", 409)]
    result = cli(*small(sources("llama"), tmp_path / "out"), "--push-to-hub", REPO, "--json")
    assert result[0] == INPUT and "409" in result[2] and f"the converted model is in {tmp_path / 'out'}" in result[2]
    assert verify(tmp_path / "out").shards == 5


def test_convert_private_alone(cli, sources, tmp_path):
    assert_refused(cli(*small(sources("llama"), tmp_path / "out"), "--private"), USAGE, "--push-to-hub")
