"""Text files of every kind: each is read by its kind, or refused in one line with its name and the number of the line."""

import codecs
import gzip
import json

import pico
import pytest

from mla_convert.core.errors import InputError, UsageError
from mla_convert.source import texts
from mla_convert.source.text_files import read_documents

ROWS = ["First text.", "Second, with é and 中.", "Third."]
JSONL = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
PLAIN = "One line.\nAnother, with é.\n"
CSV = 'id,text\n1,First text.\n2,"Second, with\ntwo ""lines"""\n'


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "name, content, found",
    [
        ("a.txt", PLAIN, [PLAIN]),
        ("a", PLAIN, [PLAIN]),
        ("a.TXT", PLAIN.replace("\n", "\r\n"), [PLAIN]),
        ("a.md", codecs.BOM_UTF8 + PLAIN.encode(), [PLAIN]),
        ("a.txt", PLAIN.encode("utf-16"), [PLAIN]),
        ("a.txt", codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"), [PLAIN]),
        ("a.txt", PLAIN.encode("utf-32"), [PLAIN]),
        ("a.txt", "{braces} open this text\n", ["{braces} open this text\n"]),
        ("a.txt", "[1] is a footnote\n", ["[1] is a footnote\n"]),
        ("a.jsonl", JSONL, ROWS),
        ("a.JSONL", JSONL, ROWS),
        ("a.ndjson", JSONL, ROWS),
        ("a.json", JSONL, ROWS),
        ("a.json", json.dumps([{"text": row} for row in ROWS], indent=1), ROWS),
        ("a.jsonl", codecs.BOM_UTF8 + JSONL.encode(), ROWS),
        ("a.jsonl", JSONL.replace("\n", "\r\n") + "\r\n\r\n", ROWS),
        ("a.jsonl", JSONL + '{"text": ""}\n', [*ROWS, ""]),
        ("a.csv", CSV, ["First text.", 'Second, with\ntwo "lines"']),
        ("a.CSV", codecs.BOM_UTF8 + CSV.encode(), ["First text.", 'Second, with\ntwo "lines"']),
        ("a.tsv", "text\tid\nFirst, text.\t1\n", ["First, text."]),
    ],
)
def test_read_for_what_it_is(tmp_path, name, content, found, packed):
    raw = content if isinstance(content, bytes) else content.encode()
    path = write(tmp_path, f"{name}.gz" if packed else name, gzip.compress(raw) if packed else raw)
    assert read_documents(path) == found


def test_packed_whatever_its_name(tmp_path):
    assert read_documents(write(tmp_path, "a.jsonl", gzip.compress(JSONL.encode()))) == ROWS


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", JSONL, "holds JSON"),
        ("a", JSONL, "holds JSON"),
        ("a.txt", json.dumps([{"text": row} for row in ROWS], indent=1), "holds JSON"),
        ("a.md", codecs.BOM_UTF8 + JSONL.encode(), "holds JSON"),
        ("a.txt", '{"a":' * 100_000, "holds JSON"),
        ("a.txt", "fine\n" + "caf\xe9", "line 2"),
        ("a.txt", "fine\nand\0not", "line 2"),
        ("a.txt", "plain".encode("utf-16-le"), "NUL"),
        ("a.txt", b"%PDF-1.7 and more", "a PDF"),
        ("a.txt", b"PK\x03\x04 and more", "ZIP"),
        ("a.jsonl", "[" * 100_000, "line 1"),
        ("a.jsonl", JSONL + "[" * 100_000, "line 4"),
        ("a.json", "[" * 100_000, "nested"),
        ("a.jsonl", JSONL + '{"text": null}', "line 4"),
        ("a.jsonl", JSONL + '{"text": 5}', "line 4"),
        ("a.jsonl", JSONL + '{"text": "bad \\udc00 one"}', "line 4"),
        ("a.jsonl", JSONL + '{"messages": [{"role": "user", "content": "x"}]}', "messages"),
        ("a.jsonl", JSONL + "plain words", "line 4"),
        ("a.jsonl", JSONL + "5", "line 4"),
        ("a.json", json.dumps([{"text": "x"}, {"body": "y"}]), "object 2"),
        ("a.jsonl", '{"text": ""}\n' * 5, "is empty"),
        ("a.csv", "id,body\n1,x\n", 'no column "text"'),
        ("a.csv", "id,text\n1\n", "line 2"),
        ("a.csv", 'id,text\n1,"open\n', "line"),
        ("a.csv", "text\nfine\nHello, world\n", "line 3"),
        ("a.tsv", "text\ttext\na\tb\n", "twice"),
        ("a.txt", '["a text", "another"]\n["third"]\n', "holds JSON"),
        ("a.parquet", b"PAR1 is how it begins", "Parquet"),
        ("a.parquet.gz", b"x", "cannot be read"),
        ("a.txt", b"", "is empty"),
    ],
)
def test_refused_with_its_name_and_line(tmp_path, name, content, words):
    raw = content.encode("latin-1") if content == "fine\n" + "caf\xe9" else content
    with pytest.raises(InputError) as refused:
        read_documents(write(tmp_path, name, raw))
    assert words in str(refused.value) and name in str(refused.value) and len(str(refused.value)) < 400


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ROWS, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == ROWS
    parquet.write_table(pyarrow.table({"text": [*ROWS, None]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"row 4 of a\.parquet"):
        read_documents(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"body": ROWS}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="only body"):
        read_documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("spec", ["package:no_such_package/text", "package:", "package:mla_demo/nothing.txt", "~nosuchuser/x.txt",
                                  "missing.NDJSON", "missing.csv.gz"])  # fmt: skip
def test_not_found(spec):
    with pytest.raises(InputError, match="found"):
        texts.load_text(spec, "calibration")


def test_none_is_for_a_conversion_alone(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="none"):
        texts.load_text("none", "calibration")
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "none", PLAIN)
    assert texts.load_text("./none", "calibration")[0] == PLAIN


def test_documents_of_one_token_are_healed_on_together(tmp_path):
    from mla_convert.heal.data import make_corpus, open_corpus
    from mla_convert.heal.windows import cut

    rows = "".join(json.dumps({"text": sign}) + "\n" for sign in pico.text(400) if sign.isascii())
    labels = make_corpus(str(write(tmp_path, "signs.jsonl", rows)), pico.tokenizer(), 300, tmp_path / "corpus")
    corpus = open_corpus(tmp_path / "corpus")
    assert labels == ["signs.jsonl"] and len(corpus.ids) == 300
    batch = cut(corpus, [0, 32], 32)
    assert (batch.labels >= 0).sum() > 16, "there is something to foretell in every window"
    with pytest.raises(InputError, match="two tokens"):
        make_corpus(str(write(tmp_path, "one.jsonl", '{"text": "a"}')), pico.tokenizer(), 300, tmp_path / "one")
