"""Untrusted sources and folders: none of their code is run or copied, no link leads out, and no text becomes markup."""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
from transformers import AutoTokenizer

from mla_convert.core.errors import InputError
from mla_convert.core.report_schema import ProbesSection, parse_report
from mla_convert.core.sums import SUMS, CorruptCheckpoint
from mla_convert.publish.engines.export import export
from mla_convert.report.html.page import page_text
from mla_convert.report.update import write_into_report
from mla_convert.source import carried
from mla_convert.source.carried import is_carried, without_code
from mla_convert.source.licence import read_licence
from mla_convert.source.load_model import find_model, load_model
from mla_convert.source.source import open_source
from mla_convert.write.verify import verify

INPUT = 4
MEAN = {"value": 0.5, "error": 0.1}
EVIL = """open({!r}, "w").write("x")
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def source(sources, tmp_path):
    shutil.copy(sources("llama").parent / "text.txt", tmp_path / "text.txt")
    return shutil.copytree(sources("llama"), tmp_path / "source")


@pytest.fixture
def folder(convert_pico, tmp_path):
    return shutil.copytree(convert_pico("llama", rank=10, rope_dim=6).out, tmp_path / "converted")


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ---- code


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("command", ["convert", "inspect", "plan"])
def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(source, tmp_path, cli, monkeypatch, command, stock):
    """If `stock`, the class is one of transformers'; stdin answers every question with yes."""
    mark = tmp_path / "ran"
    (source / "tokenization_own.py").write_text(EVIL.format(str(mark)))
    change_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]},
                tokenizer_class="PreTrainedTokenizerFast" if stock else "Own")  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    small = ["--calib", tmp_path / "text.txt", "--eval", tmp_path / "text.txt", "--calib-samples", 2, "--calib-length", 16,
             "--eval-windows", 1, "--eval-length", 16, "--refine-steps", 0, "--out", tmp_path / "out"]  # fmt: skip
    code, out, err = cli(command, source, *(small if command == "convert" else []), "-q")
    assert not mark.exists() and sys.stdin.read() == "y\n" * 9 and "Do you wish" not in out + err
    if code:
        assert code == INPUT and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
    elif command == "convert":
        assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        assert "tokenization_own" in "".join(json.loads((tmp_path / "out" / "report.json").read_text())["notes"])


def test_code_of_a_source_is_not_carried_over(source, convert_folder, tmp_path):
    mark = tmp_path / "ran"
    for name in ("tokenizer_own.py", "vocab.py", "chat_template_x.py", "tokenizer.pkl", "tokenizer.bin", "vocab.pt", "LICENSE.py",
                 "generation_config.py", "NOTICE.so", "generate.py", "merges.txt.py"):  # fmt: skip
        (source / name).write_text(EVIL.format(str(mark)))
    (source / "LICENSE-2.0").write_text("a licence")
    change_json(
        source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenizer_own.Own", "tokenizer_own.Own"]}
    )
    change_json(source / "generation_config.json", custom_generate="somebody/evil", auto_map={"x": "generate.y"})
    out = convert_folder(source, rank=10, rope_dim=8, rope_selection="engine_table").out
    export(out, tmp_path / "exported")
    for made in (out, tmp_path / "exported"):
        names = {path.name for path in made.iterdir()}
        assert not {name for name in names if name.endswith((".py", ".pkl", ".bin", ".pt", ".so"))} - {
            "attention_mla.py", "configuration_mla.py", "decode_mla.py", "latent_format_mla.py", "modeling_mla.py",
            "quantised_latent_mla.py", "stock_mla.py"}  # fmt: skip
        assert "LICENSE-2.0" in names
        for name in ("tokenizer_config.json", "generation_config.json"):
            assert not {"auto_map", "custom_generate"} & json.loads((made / name).read_text()).keys()
        AutoTokenizer.from_pretrained(made, trust_remote_code=True)
    assert not mark.exists()


@pytest.mark.parametrize("name, expected", [
    ("tokenizer.json", True), ("tokenizer.model", True), ("LICENSE", True), ("LICENSE.txt", True), ("LICENCE-MIT.md", True),
    ("NOTICE", True), ("LICENSE-CC-BY-4.0.txt", True), ("LICENSE-2.0", True), ("tokenizer.py", False), ("tokenizer_x.json", False),
    ("LICENSE.py", False), ("LICENSE.sh", False), ("NOTICE.pyc", False), ("LICENSE.tar.gz", False), ("tokenizer", False),
    ("x.model", False), ("config.json", False), ("TOKENIZER.JSON", False), ("LICENSE\n.txt", False), ("LICENSE.pickle", False),
])  # fmt: skip
def test_names_that_are_carried_over(name, expected):
    assert is_carried(name) is expected


def test_settings_without_code_keep_their_bytes():
    plain = b'{"a":   1, "auto": {"map": 2}}'
    assert without_code("tokenizer_config.json", plain) == plain
    assert without_code("tokenizer.json", b'{"auto_map": 3}') == b'{"auto_map": 3}'  # there it is a word
    assert json.loads(without_code("tokenizer_config.json", b'{"a": {"auto_map": 1, "b": [{"auto_map": 2}]}}')) == {
        "a": {"b": [{}]}
    }


# ---- links


def test_link_that_leads_out(source, tmp_path, cli):
    (tmp_path / "secret").write_text("SECRET")
    for name in ("LICENSE-MIT", "tokenizer.model", "chat_template.jinja"):
        (source / name).symlink_to(tmp_path / "secret")
        for command in ("convert", "inspect"):
            code, _, err = cli(command, source, *(["--out", tmp_path / "out"] if command == "convert" else []), "-q")
            assert code == INPUT and name in err and "outside" in err and len(err.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        (source / name).unlink()


def test_link_within_the_folder(source, convert_folder):
    (source / "terms").write_text("a licence")
    (source / "LICENSE").symlink_to("terms")
    out = convert_folder(source, rank=10, rope_dim=6).out
    assert (out / "LICENSE").read_text() == "a licence" and not (out / "LICENSE").is_symlink()


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hubs_cache(source, convert_folder, tmp_path, shared):
    """A snapshot's files are links to the model's blobs, which newer caches share between models."""
    model = tmp_path / "hub" / "models--somebody--something"
    snapshot = model / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (snapshot.parents[2] / "text.txt").write_text((tmp_path / "text.txt").read_text())
    for index, path in enumerate(sorted(source.iterdir())):
        blob = model / "blobs" / f"{index:040x}"
        if shared:
            store = tmp_path / "hub" / "blobs" / "00" / f"{index:064x}"
            store.parent.mkdir(parents=True, exist_ok=True)
            path.rename(store)
            blob.symlink_to(f"../../blobs/00/{index:064x}")
        else:
            path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{index:040x}")
    text = str(tmp_path / "text.txt")
    out = convert_folder(snapshot, rank=10, rope_dim=6, calib=text, eval=text).out
    assert (out / "tokenizer.json").is_file() and not (out / "tokenizer.json").is_symlink()
    (tmp_path / "hub" / "secret").write_text("x")
    (snapshot / "LICENSE").symlink_to(tmp_path / "hub" / "secret")
    with pytest.raises(InputError, match="LICENSE"):
        open_source(str(snapshot)).copied_files()


def test_no_regular_file(source):
    (source / "LICENSE").mkdir()
    with pytest.raises(InputError, match="LICENSE"):
        carried.carried_files(source)


@pytest.mark.parametrize("name", ["report.html", "report.json", "README.md", SUMS])
def test_nothing_is_written_through_a_link_in_a_folder(folder, tmp_path, cli, name):
    victim = tmp_path / "victim"
    victim.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(victim)
    before = victim.read_bytes()
    assert cli("report", folder)[0] == 0
    greedy = {"prompts": 1, "prompt_tokens": 2, "tokens": 3, "text": "t", "prefix": MEAN, "exact": MEAN}
    write_into_report(folder, ProbesSection.model_validate({"greedy": greedy}))
    assert victim.read_bytes() == before
    verify(folder)
    assert cli("report", folder)[0] == 0
    verify(folder)


def test_page_elsewhere(folder, tmp_path, cli):
    """A link that the user gives is followed, as by any other command."""
    (tmp_path / "page.html").symlink_to(tmp_path / "there.html")
    (tmp_path / "there.html").write_text("")
    assert cli("report", folder, "--html", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").is_symlink() and "<svg" in (tmp_path / "there.html").read_text()
    assert cli("report", folder, "--html", folder / ".." / folder.name / "report.html")[0] == 0
    verify(folder)


def test_report_from_inside(folder, cli, monkeypatch):
    monkeypatch.chdir(folder)
    assert cli("report", ".")[0] == 0
    assert (folder / "report.html").exists() and folder.stat().st_ino == (folder / ".").stat().st_ino
    verify(folder)


# ---- pickles


class Boom:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("file", ["evil.bin", "../evil.safetensors", "evil.pt", 5])
def test_index_that_names_a_pickle(source, file, capsys):
    (source / "evil.bin").write_bytes(pickle.dumps(Boom()))
    (source / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError):
        load_model(find_model(str(source)), "auto", "cpu")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["evil.bin", "evil.bin.index.json"])
def test_configuration_that_names_a_pickle(source, file, capsys):
    (source / "evil.bin").write_bytes(pickle.dumps(Boom()))
    (source / "evil.bin.index.json").write_text(json.dumps({"weight_map": {"x": "evil.bin"}}))
    change_json(source / "config.json", transformers_weights=file)
    with pytest.raises(InputError):
        load_model(find_model(str(source)), "auto", "cpu")
    assert "unpickled" not in capsys.readouterr().out


# ---- damage is not made to look right


@pytest.mark.parametrize(
    "name", ["model-00002-of-00005.safetensors", "tokenizer.json", "modeling_mla.py", "config.json"]
)
@pytest.mark.parametrize("command", ["export", "heal", "push", "refresh", "eval"])
def test_a_damaged_folder_is_no_input(folder, tmp_path, cli, command, name):
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 0x20
    (folder / name).write_bytes(content)
    options = {"export": ["--profile", "hf-code", "--pad", "none", "--out", tmp_path / "out"],
               "heal": ["--tokens", "1k", "--out", tmp_path / "out"], "push": ["some/where"], "refresh": [],
               "eval": ["--passkey", "--into-report"]}  # fmt: skip
    code, out, err = cli(command, folder, *options[command], "-q")
    assert (
        code == INPUT and name in err.replace("configuration", "config.json") and len(err.splitlines()) == 1 and not out
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(CorruptCheckpoint):
        verify(folder)


# ---- report.json as a stranger wrote it

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x'"


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.names, self.handlers = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.handlers += [name for name, value in attributes if name.startswith("on")]


def paths(value, prefix=()):
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*prefix, key)
            yield from paths(item, (*prefix, key))


def put(content, path, value):
    found = place = json.loads(json.dumps(content))
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


def whole(folder):
    content = json.loads((folder / "report.json").read_text())
    mean = MEAN
    return {
        **content,
        "sweep": [{"numbers": n, "share": n / 32, "ratio": 1 + 3 / n, "stderr": 0.01} for n in (8, 16, 24)],
        "heal": {"curve": [{"tokens": 1e6 * n, "kl": 0.3 - 0.01 * n} for n in range(1, 6)]},
        "bench": {"device": "a card", "decode": [{"context": 8192, "before": 1000.0, "after": 2500.0}]},
        "beyond": {
            "next_token": {"kl": mean, "agreement": mean, "text": "t", "protocol": "p"},
            "tasks": {"harness": "1", "limit": 5, "results": {"arc": {"metrics": {"acc": {"before": mean, "after": mean}}}}},
            "passkey": {"keys": 2, "guessing": -11.5,
                        "results": [{"length": 64, "depth": 0.5, "before": {"match": 1}, "after": {}}]},
        },
    }  # fmt: skip


def test_no_word_of_a_report_is_markup(folder):
    content, shown = whole(folder), 0
    allowed = Tags(page_text(parse_report(content))).names
    for path in [
        *paths(content),
        ("settings", MARKUP),
        ("versions", MARKUP),
        ("checksums", MARKUP),
        ("phases", MARKUP),
    ]:
        for value in (MARKUP, [MARKUP], {MARKUP: MARKUP}):
            try:
                html = page_text(parse_report(put(content, path, value)))
            except InputError as error:
                assert "\n" not in str(error)
                continue
            found = Tags(html)
            assert found.names <= allowed and not found.handlers and "<script" not in html and "<img" not in html, path
            shown += MARKUP[:8] in html or "&lt;script" in html
    assert shown > 20


@pytest.mark.parametrize(
    "value", [None, {}, [], 0, -1, 1e300, float("nan"), float("inf"), True, "", "x", 10**30, [[]], {"a": None}]
)
def test_wrong_types_in_a_report_are_one_line(folder, value):
    content = whole(folder)
    for path in paths(content):
        changed = put(content, path, value)
        try:
            page_text(parse_report(changed))
        except InputError as error:
            assert "\n" not in str(error)


def test_inspect_leaves_out_what_makes_no_sense(folder, cli):
    for path, value in ((("evaluation", "after", "value"), {}), (("cache", "bytes_per_token", "before"), None)):
        content = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps(put(content, path, value)))
        code, out, err = cli("inspect", folder)
        assert code == 0 and "no complete report.json" in out and not err


def test_reports_of_every_kind_pass(convert_pico):
    for options in ({}, {"refine_steps": 2}, {"uniform": False}, {"rank": 8, "rope_dim": 0}):
        parse_report(
            json.loads(
                (convert_pico("llama", **({"rank": 10, "rope_dim": 6} | options)).out / "report.json").read_text()
            )
        )


# ---- the licence of a source's card

CARDS = [
    ("license:\n- mit\n- 1", None), ("1: 2", None), ("license: 5", None), ("license: {a: b}", None), ("license: []", None),
    ("license: ''", None), ("license: [mit, apache-2.0]", ["mit", "apache-2.0"]), ("license: mit\n1: 2\n? [a]\n: b", None),
    ("license: 2020-99-99", None), ("license: 2020-01-01", None), ("license: !!python/object:os.system x", None),
    ("license: &a [*a]", None), ("license: 'a\n\n  b'", None), ("license: \"a`b\"", None), ("license: '<script>'", None),
    ("license: mit\nlicense_name: [x]\nlicense_link: 5", "mit"), ("license: mit\nlicense_link: 'x) [y](z'", "mit"),
    ("license: " + "x" * 999, None), ("- a\n- b", None), ("license: \"\\u0000\"", None), ("license: mit\nlicense: other", "other"),
    ("license: other\nlicense_name: '---'\nlicense_link: LICENSE", "other"), ("a: " + "[" * 3000, None),
    ("license: \"\\ud800\"", None),
    ("license: 1__9:30:99999999999999999999", "1__9:30:99999999999999999999"),
    ("tags: !!binary x\nlicense: mit", None), ("? !!set\n: 1", None),
]  # fmt: skip


@pytest.mark.parametrize("metadata, expected", CARDS)
def test_odd_cards(folder, tmp_path, metadata, expected):
    from huggingface_hub import ModelCard

    from mla_convert.report.model_card import write_card

    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# x\n")
    found = read_licence(tmp_path)
    assert found["license"] == expected
    content = json.loads((folder / "report.json").read_text())
    content["source"] = {**content["source"], "license": None, **found}
    write_card(parse_report(content), tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.license == (expected or "unknown")


@pytest.mark.parametrize("content", [
    b"\xff\xfe---\nlicense: mit\n---\n", b"\xef\xbb\xbf---\nlicense: mit\n---\n", b"---\r\nlicense: mit\r\n---\r\n",
    b"---\nlicense: mit\n", b"", gzip.compress(b"x", mtime=0), b"---\n---\n",
])  # fmt: skip
def test_cards_in_odd_bytes(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    assert read_licence(tmp_path)["license"] in ("mit", None)


def test_no_card(tmp_path):
    assert read_licence(tmp_path) == {"license": None}


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder, tmp_path):
    os.mkfifo(tmp_path / "README.md")
    assert read_licence(tmp_path) == {"license": None}
    (folder / SUMS).unlink()
    os.mkfifo(folder / SUMS)
    with pytest.raises(CorruptCheckpoint, match=f"{SUMS} cannot be read"):
        verify(folder)


def test_an_odd_card_costs_no_conversion(source, convert_folder):
    (source / "README.md").write_text("---\nlicense:\n- mit\n- 1\n1: 2\n---\n")
    out = convert_folder(source, rank=10, rope_dim=6).out
    assert re.search("license: unknown", (out / "README.md").read_text())
