"""Quality at equal bytes: the points of a report, the sentence below them, and the chart."""

import copy
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from mla_convert.core.errors import InputError
from mla_convert.core.report_schema import EarlierState, parse_report
from mla_convert.report import frontier
from mla_convert.report.html import frontier as charts
from mla_convert.report.html.page import page_text
from mla_convert.report.html.plots import BOTTOM, LEFT, RIGHT, TOP
from mla_convert.report.model_card import card_text

TITLE = "Quality at equal bytes"


@pytest.fixture(scope="module")
def plain(convert_pico):
    """report.json of a conversion to half of the cache."""
    return json.loads((convert_pico("llama", rank=10, rope_dim=6, refine_steps=2).out / "report.json").read_text())


@pytest.fixture
def content(plain):
    """The same with a known KL and three quantised caches of the original."""
    found = copy.deepcopy(plain)
    evaluation = found["evaluation"]
    evaluation["kl"] = {"value": 0.02, "error": 0.002}
    where = {"text": evaluation["text"], "protocol": evaluation["protocol"]}
    caches = (("int8", 0.5625, 0.0002), ("fp8", 0.5, 0.009), ("int4-hadamard", 0.28125, 0.05))
    found["original_cache"] = {**where, "dtype": "float32", "device": "CPU", "formats": [
        {"format": name, "share": share, "ratio": 1 + kl, "kl": {"value": kl, "error": kl / 10}} for name, share, kl in caches
    ]}  # fmt: skip
    return found


def points(content):
    return frontier.points(parse_report(content))


def verdict(content):
    return frontier.verdict(points(content))


def test_a_model_that_loses_against_a_flag_says_so(content):
    assert content["cache"]["share_saved"] == 0.5
    assert verdict(content) == (
        "This model loses against a flag: it has 50.0% of the bytes at a KL of 0.02000 nats; the unconverted original has with "
        "its cache in FP8 50.0% at 0.00900 nats."
    )
    content["original_cache"]["formats"][2]["kl"]["value"] = 0.01
    assert "in FP8 50.0% at 0.00900, in INT4 + Hadamard 28.1% at 0.01000 nats" in verdict(content)


def test_a_model_that_does_not_lose_says_what_it_was_compared_with(content):
    content["evaluation"]["kl"]["value"] = 0.008  # INT8 is nearer, with more bytes
    assert verdict(content).endswith("every quantised cache of the original that was measured at equal or fewer bytes.")
    content["cache"]["share_saved"] = 0.9
    assert verdict(content).startswith(
        "No quantised cache of the original that was measured is as small as this model's"
    )
    del content["original_cache"]
    assert verdict(content) == ""


def test_table_holds_the_model_and_the_caches(content):
    table = frontier.table(points(content))
    assert [(row[0], row[1], row[2]) for row in table.rows] == [
        ("original, INT8 cache", "56.2%", "0.00020"),
        ("original, FP8 cache", "50.0%", "0.00900"),
        ("converted", "50.0%", "0.02000"),
        ("original, INT4 + Hadamard cache", "28.1%", "0.05000"),
    ]
    assert table.bold == 2
    report = parse_report(content)
    for text in (page_text(report), card_text(report)):
        assert TITLE in text and "This model loses against a flag" in text
        assert all(row[0] in text and row[2] in text for row in table.rows)


def test_only_equal_windows_are_compared(content):
    content["original_cache"]["protocol"] = "other windows"
    assert [point.name for point in points(content)] == ["converted"]
    html = page_text(parse_report(content))
    assert f"<h2>{TITLE}</h2>" not in html and "KL divergence against bytes" not in html


def test_states_that_heal_and_quantize_replaced_are_kept(content):
    where = {key: content["evaluation"][key] for key in ("text", "protocol")}
    (state,) = frontier.state_of(parse_report(content))
    assert (state.name, state.share, state.kl.value, state.text) == ("converted", 0.5, 0.02, where["text"])
    packed = EarlierState(name="healed", share=0.2, latent_cache={"kind": "mixed"}, kl={"value": 0.1}, **where)
    other = EarlierState(name="healed", share=0.3, kl={"value": 0.1}, text="t", protocol="p")
    content["earlier_states"] = [state.as_dict(), packed.as_dict(), other.as_dict()]
    content["heal"] = {}
    found = [(point.name, point.series, point.share) for point in points(content)]
    assert found[:3] == [
        ("converted", "rank", 0.5),
        ("healed in int8 and int4", "quantised", 0.2),
        ("healed", "rank", 0.5),
    ]


def test_first_reports_of_healing_have_the_unhealed_model(content):
    """Those without earlier states, with KL among the probes."""
    evaluation = content["evaluation"]
    kl = evaluation.pop("kl"), evaluation.pop("agreement")
    probe = {"text": evaluation["text"], "protocol": evaluation["protocol"], "kl": kl[0], "agreement": kl[1]}
    before = {**probe, "kl": {"value": 0.07}}
    content["probes"] = {"next_token": probe}
    content["heal"] = {"before": {"evaluation": evaluation, "probes": {"next_token": before}}}
    found = {point.name: point.kl.value for point in points(content) if point.series == "rank"}
    assert found == {"converted": 0.07, "healed": 0.02}


def marks(html, label="KL divergence against bytes of the cache"):
    figures = [ElementTree.fromstring(found) for found in re.findall(r"<svg .*?</svg>", html, re.DOTALL)]
    return [figure for figure in figures if figure.get("aria-label").startswith(label)]


def test_the_chart_has_every_point_at_its_place(content):
    content["sweep"] = [
        {"share": share, "ratio": 1.1, "kl": {"value": kl}, **({"latent_cache": {"kind": "int4"}} if packed else {})}
        for share, kl, packed in ((0.5, 0.02, False), (0.25, 0.2, False), (0.2, 0.03, True), (0.1, 0.4, True))
    ]
    html = page_text(parse_report(content))
    assert "the original with a quantised cache" in html and "quantised latents" in html
    wide, narrow = marks(html)
    for figure, width in ((wide, 768), (narrow, 343)):
        found = {shape[0].text: shape for shape in figure.iter() if len(shape) and shape[0].tag.endswith("title")}
        assert len(found) == 3 + 1 + 4 + 1  # caches, the model, sizes of the sweep, and the ring
        assert found["this model"].get("class") == "ring"
        diamond = found["original, FP8 cache, 50.0% of the bytes: 0.0090 ± 0.0009 nats"]
        circle = found["converted, 50.0% of the bytes: 0.0200 ± 0.0020 nats"]
        assert diamond.get("class") == "flag" and circle.get("class") == "after"
        at = LEFT + 50 / 60 * (width - RIGHT - LEFT)
        assert float(circle.get("cx")) == pytest.approx(at, abs=0.1) == float(found["this model"].get("cx"))
        corners = [tuple(map(float, corner.split(","))) for corner in diamond.get("points").split()]
        assert sum(x for x, _ in corners) / 4 == pytest.approx(at, abs=0.1)
        # KL from 0.0002 to 0.4 and a factor of 1.8 beyond both ends are the whole height of the axis
        decade = (charts.HEIGHT - BOTTOM - TOP) / math.log10(0.4 / 0.0002 * 1.8**2)
        height = sum(y for _, y in corners) / 4 - float(circle.get("cy"))
        assert height == pytest.approx(math.log10(0.02 / 0.009) * decade, abs=0.1)
        assert all(TOP <= y <= charts.HEIGHT - BOTTOM for _, y in corners)
        assert len([shape for shape in figure.iter() if shape.tag.endswith("path")]) == 2
    assert "original, INT8 cache, 56.2% of the bytes: 0.0002 nats" in wide.get("aria-label")


def test_one_point_is_no_chart(plain):
    assert marks(page_text(parse_report(plain))) == []
    assert charts.frontier(frontier.points(parse_report(plain)), 768) is None


@pytest.mark.parametrize("value", [0.0, 1e-12, None, 1e30])
def test_values_without_a_place_on_the_axis(content, value):
    content["original_cache"]["formats"][0]["kl"] = {"value": value}
    for figure in marks(page_text(parse_report(content))):
        assert not re.findall(r'="(nan|inf)"', ElementTree.tostring(figure, "unicode"))


def test_labels_do_not_meet(content):
    for figure in marks(page_text(parse_report(content))):
        texts = [(shape.text, float(shape.get("x")), float(shape.get("y"))) for shape in figure.iter()
                 if shape.tag.endswith("text") and shape.get("class") == "tick" and not shape.text[0].isdigit()]  # fmt: skip
        assert {name for name, _, _ in texts} == {"INT8", "FP8", "INT4 + Hadamard", "converted"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": "<b>"}, r"original_cache.formats\[0\].format should be one of fp8"),
        ({"share": -1}, "share should be no less than 0"),
        ({"kl": 3}, "kl should be an object"),
    ],
)
def test_a_strangers_report_is_checked(content, change, words):
    content["original_cache"]["formats"][0] |= change
    with pytest.raises(InputError, match=words):
        parse_report(content)
