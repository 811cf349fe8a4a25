"""The model card states what the report holds, and says where it holds nothing."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from mla_convert.core.report_schema import parse_report
from mla_convert.report.model_card import write_card
from mla_convert.source.source import open_source

ON_HUB = {"name": "meta-llama/Llama-3.1-8B", "revision": "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b"}
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1@test"


@pytest.fixture
def card(convert_pico, tmp_path):
    """Makes a card from a real report with some entries changed."""
    content = json.loads((convert_pico("llama", rank=10, rope_dim=6).out / "report.json").read_text())

    def make(source=(), evaluation=()):
        changed = {**content, "source": {**content["source"], **dict(source)},
                   "evaluation": {**content["evaluation"], **dict(evaluation)}}  # fmt: skip
        write_card(parse_report(changed), tmp_path)
        return ModelCard.load(tmp_path / "README.md")

    return make


def test_from_the_hub(card):
    found = card(ON_HUB)
    assert found.data.base_model == ON_HUB["name"] and found.data.base_model_relation == "quantized"
    assert f"(https://huggingface.co/{ON_HUB['name']}), at revision `{ON_HUB['revision']}`" in found.text


def test_from_a_folder(card):
    found = card()
    assert found.data.get("base_model") is None and found.data.get("base_model_relation") is None
    assert "huggingface.co" not in found.text


def test_licence_is_carried_over(card):
    found = card({"license": "other", "license_name": "llama3.1", "license_link": "https://example.org/LICENSE"})
    data = found.data
    named = (data.license, data["license_name"], data["license_link"])
    assert named == (
        "other",
        "llama3.1",
        "https://example.org/LICENSE",
    )
    assert "[llama3.1](https://example.org/LICENSE)" in found.text
    assert "`apache-2.0`" in card({"license": "apache-2.0"}).text
    found = card({"license": ["mit", "apache-2.0"]})
    assert found.data.license == ["mit", "apache-2.0"] and "`mit, apache-2.0`" in found.text


def test_unknown_licence_is_stated(card):
    found = card({"license": None})
    assert found.data.license == "unknown" and "did not say which one it is" in found.text


@pytest.mark.parametrize("readme, expected", [
    ("---\nlicense: llama3.1\nlicense_link: LICENSE\n---\n# x", {"license": "llama3.1", "license_link": "LICENSE"}),
    ("---\ntags: [a]\n---\n", {"license": None}), ("no metadata", {"license": None}), ("---\n: [\n---\n", {"license": None}),
    (None, {"license": None}),
])  # fmt: skip
def test_licence_of_a_source(sources, tmp_path, readme, expected):
    folder = shutil.copytree(sources("llama"), tmp_path / "source")
    if readme:
        (folder / "README.md").write_text(readme)
    assert open_source(str(folder), weights=False).license() == expected


def test_model_index_names_the_data_set(card):
    (first, second) = card(evaluation={"text": WIKITEXT}).data.eval_results
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert first.metric_value != second.metric_value and first.metric_type == "perplexity"
    (first, _) = card(evaluation={"text": "mine.txt"}).data.eval_results
    assert first.dataset_type == "text" and first.dataset_name == "mine.txt"


def test_sections_and_sentences(card):
    text = card(ON_HUB).text
    for words in ("less KV cache", "| perplexity |", "4 windows of 48 tokens", "Calibrated on", "trust_remote_code=True",
                  "## Limits", "## Licence", "mean square error"):  # fmt: skip
        assert words in text
