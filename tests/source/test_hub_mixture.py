"""The Hub mixture: its names and weights, pinned revisions, rows of several configurations in turns, and what goes wrong."""

import pico
import pytest

from mla_convert.core.errors import InputError, ResourceError, UsageError
from mla_convert.source import hub_mixture, texts
from mla_convert.source.chat import dialogues
from mla_convert.source.conversations import load_conversations
from mla_convert.source.mixture import HUB_KINDS, PACKAGED, Part, parts


@pytest.fixture
def hub(monkeypatch):
    """Data sets that are made up: a row names its place. Returns what was asked for, and how many rows a config has."""
    import datasets

    asked, rows = [], {"count": 3}

    def load(name, config, split, streaming, revision):
        asked.append((name, config, split, streaming, revision))
        column = next(text.column for text in hub_mixture.TEXTS.values() if text.name == name)
        count = rows["count"] - (config == "ruby")
        said = [{"role": "user", "content": f"Hi {config}"}, {"role": "assistant", "content": "Hello"}]
        content = [said if column == "messages" else f"{config} {number}" for number in range(count)]
        return datasets.Dataset.from_dict({column: content}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return asked, rows


def test_all_kinds_share_the_weight_of_the_mixture():
    assert tuple(hub_mixture.TEXTS) == HUB_KINDS
    assert parts("hub") == [Part(f"hub:{kind}", 0.2) for kind in HUB_KINDS]
    assert sum(part.weight for part in parts(["hub=3", "mine.txt"])) == pytest.approx(4)
    packaged = parts(["package=3", "mine.txt"])
    assert [part.spec for part in packaged] == [*PACKAGED, "mine.txt"] and {part.weight for part in packaged[:-1]} == {
        3 / len(PACKAGED)
    }
    assert parts(["hub:code=2", "hub:web"]) == [Part("hub:code", 2), Part("hub:web")]
    with pytest.raises(InputError, match="hub:web is given twice"):
        parts(["hub", "hub:web"])


def test_a_file_of_that_name_goes_before(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()  # a folder is no text
    (tmp_path / "hub").write_text("my text")
    monkeypatch.chdir(tmp_path)
    assert len(parts("package")) == len(PACKAGED) and texts.load_text("hub", "evaluation")[0] == "my text"
    assert parts("hub") == [Part("hub")]


def test_configurations_are_read_in_turns_at_one_revision(hub):
    text, label = texts.load_text("hub:code", "calibration")
    assert text.split("\n\n")[:7] == ["python 0", "javascript 0", "java 0", "go 0", "php 0", "ruby 0", "python 1"]
    assert text.endswith("python 2\n\njavascript 2\n\njava 2\n\ngo 2\n\nphp 2")
    assert label == "code-search-net/code_search_net at bd0cf261e357"
    assert {(split, streaming, len(revision)) for _, _, split, streaming, revision in hub[0]} == {("train", True, 40)}


def test_only_the_beginning_is_read(hub):
    hub[1]["count"] = 1000
    documents, _ = texts.load_documents("hub:mathematics")
    assert hub_mixture.beginning(documents, most=100) == [
        f"default {number}" for number in range(11)
    ]  # 11 of 9 or 10 characters
    assert next(documents) == "default 11"  # the stream goes on


def test_conversations_are_in_the_models_template(hub):
    text, label = texts.load_text("hub:dialogue", "calibration")
    assert text.startswith("User: Hi default\n\nAssistant: Hello") and "ultrachat_200k" in label
    assert dialogues([[], [{"role": "system", "content": "Be brief."}]], None) == ("\n\n\nSystem: Be brief.", False)
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert texts.load_text("hub:dialogue", "calibration", tokenizer)[0].startswith("<user>Hi default<assistant>Hello")


def test_what_goes_wrong(hub, monkeypatch):
    import datasets

    with pytest.raises(InputError, match="no text hub:poems: the Hub mixture has hub:web, hub:code"):
        texts.load_text("hub:poems", "calibration")
    for name in ("hub", "package"):
        with pytest.raises(UsageError, match=f"{name} is several texts, and the evaluation text is one"):
            texts.load_text(name, "evaluation")
        with pytest.raises(InputError, match=f"{name} is text, not conversations"):
            load_conversations(name)
    with pytest.raises(InputError, match="hub:dialogue is text, not conversations"):
        load_conversations("hub:dialogue")
    other = datasets.Dataset.from_dict({"body": ["a"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: other)
    with pytest.raises(InputError, match="fineweb-edu at 87f09149ef47' has no column 'text', only body"):
        texts.load_text("hub:web", "calibration")

    def breaking():
        yield {"text": "first"}
        raise FileNotFoundError("gone")

    stream = datasets.IterableDataset.from_generator(breaking)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(ResourceError, match=r"fineweb-edu at 87f09149ef47' could not be read on: .*gone"):
        texts.load_text("hub:web", "calibration")

    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ResourceError, match="fineweb-edu at 87f09149ef47' cannot be fetched"):
        texts.load_text("hub:web", "calibration")
    with pytest.raises(UsageError):
        texts.load_text("none", "calibration")
