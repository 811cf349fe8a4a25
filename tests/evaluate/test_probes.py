"""Quality probes of `eval`: pass keys, greedy continuations, tasks of the harness, and their entries in a report."""

import importlib.util
import json
import math
import random
import re
import shutil

import pico
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mla_convert.core.errors import InputError
from mla_convert.core.report_schema import parse_report
from mla_convert.core.sums import seal
from mla_convert.evaluate.quality import greedy_agreement as decoding
from mla_convert.evaluate.quality import passkey
from mla_convert.report import quality_rows
from mla_convert.report.html.page import page_text
from mla_convert.write.verify import verify

USAGE, INPUT = 2, 4
HARNESS = importlib.util.find_spec("lm_eval")
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm_eval is not installed (extra eval)")


@pytest.fixture
def small(sources):
    text = sources("llama").parent / "text.txt"
    return "--eval", text, "--eval-windows", 3, "--eval-length", 48, "--device", "cpu", "-q"


@pytest.fixture
def folder(convert_pico, tmp_path):
    return shutil.copytree(convert_pico("llama", rank=10, rope_dim=6).out, tmp_path / "converted")


@pytest.fixture
def load(convert_pico, sources):
    """A model, converted or not, by its variant."""

    def get(name, converted=True, **settings):
        folder = convert_pico(name, **(settings or {"kv_ratio": 0.5})).out if converted else sources(name)
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    return get


# ---- pass keys


def test_prompts_hold_key_and_question():
    tokenizer = pico.tokenizer()
    prompts = passkey.make_prompts(tokenizer, [512, 2048], seed=3)
    assert len(prompts) == 2 * 2 * len(passkey.DEPTHS) * passkey.KEYS
    single, several = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    assert {prompt.needles for prompt in single} == {1} and {prompt.needles for prompt in several} == {5}
    needle_of, question = (lambda key: passkey.NEEDLE.format(of="", key=key)), passkey.QUESTION.format(of="")
    for prompt in single:
        text, key = tokenizer.decode(prompt.ids), tokenizer.decode(prompt.key)
        needle = needle_of(key.strip())
        assert re.fullmatch(r" \d{5}", key) and text.count(needle) == 1 and text.endswith(question)
        assert len(re.findall(r"\d", text)) == 5  # no other number
        assert prompt.length - 600 < len(prompt.ids) + len(prompt.key) <= prompt.length
        before = text.index(needle) / (len(text) - len(needle) - len(question))
        assert abs(before - prompt.depth) < (0.35 if prompt.length == 512 else 0.2)
        if prompt.depth in (0, 1):
            assert text.startswith(needle) if prompt.depth == 0 else text.endswith(f"{needle}\n{question}")
    assert prompts == passkey.make_prompts(tokenizer, [512, 2048], seed=3)
    assert prompts != passkey.make_prompts(tokenizer, [512, 2048], seed=4)


def test_one_of_several_keys_is_asked_for():
    tokenizer = pico.tokenizer()
    prompts = [prompt for prompt in passkey.make_prompts(tokenizer, [1024], seed=3) if prompt.needles > 1]
    asked = []
    for prompt in prompts:
        text, key = tokenizer.decode(prompt.ids), tokenizer.decode(prompt.key).strip()
        found = dict(re.findall(r"The pass key( of the \w+) is (\d{5})\. Remember", text))
        assert tuple(found) == passkey.NAMES and len({*found.values()}) == 5  # one at each depth, in this order
        (name,) = re.findall(r"What is the pass key( of the \w+)\?", text)
        assert found[name] == key and text.endswith(f"The pass key{name} is")
        assert name == passkey.NAMES[passkey.DEPTHS.index(prompt.depth)] and len(prompt.ids) + len(prompt.key) <= 1024
        asked.append(name)
    assert sorted(asked) == sorted(passkey.NAMES * passkey.KEYS)
    # a text that is too short for five keys has one
    assert {prompt.needles for prompt in passkey.make_prompts(tokenizer, [200], 0)} == {1}


def test_repetition_of_a_continuation():
    assert decoding.repeated_share([1, 2, 3]) == 0 and decoding.repeated_share(list(range(20))) == 0
    assert decoding.repeated_share([7] * 20) == pytest.approx(16 / 17)
    described = decoding.describe([[7] * 20, list(range(10))])
    assert described.length.value == 15 and described.repeated.value == pytest.approx(8 / 17)


def test_prompts_begin_as_the_tokenizer_begins(sources):
    """Special tokens before a text are kept, those after it are not, because a prompt is continued."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(sources("llama"))
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    assert tokenizer("The")["input_ids"][-1] == tokenizer.eos_token_id
    prompt = passkey.make_prompts(tokenizer, [256], 0)[0]
    assert prompt.ids[0] == tokenizer.bos_token_id and prompt.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in prompt.ids


def test_ladder():
    assert passkey.ladder(131072) == [512, 2048, 8192, 32768, 131072]
    assert passkey.ladder(2047) == [2047] and passkey.ladder(256) == [256] and passkey.ladder(3000) == [750, 3000]


def test_context_too_short_for_a_key():
    with pytest.raises(InputError, match="60 tokens is too short"):
        passkey.make_prompts(pico.tokenizer(), [60], 0)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
@pytest.mark.parametrize("converted", [True, False])
def test_log_probability_is_that_of_the_whole_sequence(load, name, converted):
    """Decoding with the cache, absorbed or not, gives the log-probability of one pass without a cache."""
    model = load(name, converted)
    prompts = passkey.make_prompts(pico.tokenizer(), [200], 0)[::5]
    for prompt, found in zip(prompts, passkey.retrieve(model, prompts), strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([prompt.ids + prompt.key]), use_cache=False).logits[0].log_softmax(-1)
        scores = scores[len(prompt.ids) - 1 : -1]
        expected = scores.gather(1, torch.tensor(prompt.key)[:, None]).sum()
        assert found.log_probability == pytest.approx(float(expected), abs=1e-3)
        assert found.match == (scores.argmax(-1).tolist() == prompt.key)


def test_a_model_that_finds_the_key():
    """A model that reads the key from its prompt finds every key."""
    tokenizer = pico.tokenizer()

    class Reader(torch.nn.Module):
        config, device = pico.config("llama"), torch.device("cpu")

        def forward(self, input_ids, past_key_values, use_cache):
            self.seen = input_ids[0].tolist() if input_ids.shape[1] > 1 else [*self.seen, int(input_ids)]
            text = tokenizer.decode(self.seen)
            key, said = re.search(r"is (\d+)\.", text)[1], text.rpartition(" is")[2]
            logits = torch.zeros(1, 1, pico.VOCAB)
            # the first pass ends before the question does: what it says is not asked for
            logits[..., tokenizer(f" {key}"[len(said) % 6], add_special_tokens=False)["input_ids"][0]] = 20
            return type("Output", (), {"logits": logits})

    prompts = passkey.make_prompts(tokenizer, [256], 0)
    found = passkey.retrieve(Reader(), prompts)
    assert all(each.match for each in found) and found[0].log_probability == pytest.approx(0, abs=1e-4)
    # another key is neither found nor likely
    wrong = [passkey.Prompt(256, 0.0, prompts[0].ids, tokenizer(" 00000", add_special_tokens=False)["input_ids"])]
    (other,) = passkey.retrieve(Reader(), wrong)
    assert not other.match and other.log_probability < -50


# ---- greedy continuations


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_greedy_is_that_of_generate(load, name):
    model = load(name)
    ids = torch.tensor([[random.Random(0).randrange(4, pico.VOCAB) for _ in range(20)]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, 20:
    ].tolist()
    assert decoding.continue_greedily(model, ids[0].tolist(), 12, set()) == expected
    end = expected[4]
    assert decoding.continue_greedily(model, ids[0].tolist(), 12, {end}) == expected[: expected.index(end) + 1]


def test_agreement_by_hand():
    original = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 2]]
    model = [[1, 2, 3, 4], [5, 0, 7, 8], [9, 9, 9, 9]]
    found = decoding.compare(torch.zeros(3, 10), 4, original, model, "text.txt", "3 windows")
    assert (found.prompts, found.prompt_tokens, found.tokens) == (3, 10, 4)
    assert found.prefix.value == pytest.approx((1 + 0.25 + 0.5) / 3) and found.exact.value == pytest.approx(1 / 3)
    assert found.exact.error == pytest.approx(torch.tensor([1.0, 0, 0]).std() / math.sqrt(3))


# ---- the command


def test_exact_conversion_agrees_in_everything(cli, convert_pico, sources, small):
    out = convert_pico("llama", rank="full", rope_dim="full").out
    options = ("--against", sources("llama"), "--passkey", "--greedy", 2, "--greedy-tokens", 8, "--json")
    code, text, err = cli("eval", out, *small, *options)
    assert code == 0, err
    found = json.loads(text)["probes"]
    assert found.keys() == {"next_token", "greedy", "passkey"}
    assert found["greedy"]["prefix"]["value"] == found["greedy"]["exact"]["value"] == 1
    assert found["greedy"]["prompts"] == 2 and found["greedy"]["prompt_tokens"] == 24
    cells = found["passkey"]["results"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(256, depth) for depth in passkey.DEPTHS]
    for cell in cells:
        assert cell["before"]["log_probability"] == pytest.approx(cell["after"]["log_probability"], abs=1e-3)
    assert all(part["dtype"] == "float32" and part["against"] == "source" for part in found.values())


def test_table_and_report(cli, folder, sources, small):
    before = json.loads((folder / "report.json").read_text())
    options = ("--passkey-length", 200, "--greedy", 9, "--greedy-tokens", 6, "--into-report")
    code, out, err = cli("eval", folder, *small, "--against", sources("llama"), *options)
    flat = " ".join(out.split())
    assert (
        code == 0 and not err and "pass key found, 200 tokens" in flat and "greedy, same to the end (3 prompts)" in flat
    )
    assert "3 prompts of 24 tokens of text.txt" in flat and "-11.41 for guessing evenly" in flat
    after = json.loads((folder / "report.json").read_text())
    assert {**after, "probes": None} == {**before, "probes": None} and after["probes"].keys() >= {
        "next_token",
        "greedy",
    }
    verify(folder)
    html, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    assert (
        html == page_text(parse_report(after))
        and "<h2>Quality probes</h2>" in html
        and "Pass keys by length and depth" in html
    )
    assert (
        all(row[0] in html and row[0] in card for row in quality_rows.probe_rows(parse_report(after).probes))
        and "## Quality probes" in card
    )
    assert "Quality probes" not in page_text(parse_report(before))
    assert str(folder.parent) not in json.dumps(after["probes"]) and not list(folder.glob(".report*"))
    # without an original and at another length: probes of other kinds stay
    assert cli("eval", folder, *small, "--passkey-length", 160, "--into-report")[0] == 0
    again = json.loads((folder / "report.json").read_text())["probes"]
    assert again["greedy"] == after["probes"]["greedy"]
    assert [cell["length"] for cell in again["passkey"]["results"]] == [160] * 5
    assert all(cell["before"] is None for cell in again["passkey"]["results"])
    verify(folder)


def test_the_card_gains_one_section(cli, folder, small):
    before = (folder / "README.md").read_text()
    assert cli("eval", folder, *small, "--passkey-length", 160, "--into-report")[0] == 0
    after = (folder / "README.md").read_text()
    start, end = after.index("\n## Quality probes"), after.index("\n## Load")
    assert after[:start] + after[end:] == before


def test_report_of_figures_that_are_not_finite(cli, folder, small):
    file = folder / "report.json"
    content = json.loads(file.read_text())
    content["evaluation"] |= {"ratio": None, "after": {**content["evaluation"]["after"], "value": None}}
    file.write_text(json.dumps(content))
    seal(folder)
    assert cli("eval", folder, *small, "--passkey-length", 160, "--into-report")[0] == 0
    verify(folder)
    assert json.loads(file.read_text())["evaluation"] == content["evaluation"]


@pytest.mark.parametrize(
    "code, culprit, options",
    [
        (USAGE, "--against", ("--greedy", "2")),
        (USAGE, "--greedy -1", ("--greedy", "-1")),
        (USAGE, "--greedy-tokens 0", ("--greedy", "2", "--greedy-tokens", "0", "--against", "ORIGINAL")),
        (USAGE, "without --greedy", ("--greedy-tokens", "4")),
        (INPUT, "--greedy-tokens", ("--greedy", "2", "--greedy-tokens", "250", "--against", "ORIGINAL")),
        (USAGE, "--passkey-length 0", ("--passkey-length", "0")),
        (INPUT, "256", ("--passkey-length", "257")),
        (INPUT, "too short", ("--passkey-length", "60")),
        (USAGE, "--tasks", ("--tasks", " , ")),
        (USAGE, "--tasks", ("--task-limit", "3")),
        (USAGE, "nothing to write", ("--into-report",)),
    ],
)
def test_refused(cli, folder, sources, small, code, culprit, options):
    options = [sources("llama") if option == "ORIGINAL" else option for option in options]
    found, out, err = cli("eval", folder, *small, *options)
    assert found == code and not out
    (line,) = err.splitlines()
    assert line.startswith("mla-convert: ") and culprit in line


def test_no_report_to_write_into(cli, sources, small, folder):
    assert cli("eval", sources("llama"), *small, "--passkey", "--into-report")[0] == INPUT
    assert cli("eval", "owner/name", *small, "--passkey", "--into-report")[0] == USAGE
    (folder / "report.json").write_text('{"checksums": {}}')
    code, out, err = cli("eval", folder, *small, "--passkey-length", 160, "--into-report")
    assert code == INPUT and not out and len(err.splitlines()) == 1
    assert (folder / "report.json").read_text() == '{"checksums": {}}'


# ---- lm-evaluation-harness

TASK = """
task: tiny_colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""

GENERATES = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["red", "green", "blue", "black"]
    rows = [{"question": f"Item {n} is", "choices": words, "answer": n % 4} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "tiny.yaml"
    file.write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    return file


@needs_harness
def test_task_of_a_file(cli, folder, sources, small, task):
    options = ("--against", sources("llama"), "--tasks", task, "--into-report", "--json")
    code, out, err = cli("eval", folder, *small, *options)
    assert code == 0 and not err, err
    found = json.loads(out)["probes"]["tasks"]
    tiny = found["results"]["tiny_colours"]
    assert tiny["examples"] == 12 and found["limit"] is None
    for side, place in (("before", sources("llama")), ("after", folder)):
        assert tiny["metrics"]["acc"][side]["value"] == pytest.approx(accuracy(place), abs=1e-6)
        assert 0 <= tiny["metrics"]["acc"][side]["error"] < 0.2
    assert "tiny_colours, acc" in (folder / "report.html").read_text()
    verify(folder)


def accuracy(folder):
    """Of the task above, by hand: the likeliest choice after a space."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = 0
    for n in range(12):
        start, scores = tokenizer(f"Item {n} is")["input_ids"], []
        for word in ("red", "green", "blue", "black"):
            own = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                said = model(torch.tensor([start + own])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            scores.append(float(said.gather(1, torch.tensor(own)[:, None]).sum()))
        right += scores.index(max(scores)) == n % 4
    return right / 12


@needs_harness
def test_task_that_generates(cli, folder, sources, small, task):
    """Prompts of several lengths in one padded batch, through the model's own `generate`."""
    rows = [{"question": "Item " * n, "answer": continuation(folder, "Item " * n)} for n in range(1, 6)]
    task.with_name("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = task.read_text().partition("output_type")[0]
    task.write_text(content + GENERATES)
    code, out, err = cli("eval", folder, *small, "--tasks", task, "--json")
    assert code == 0 and not err, err
    assert (
        json.loads(out)["probes"]["tasks"]["results"]["tiny_colours"]["metrics"]["exact_match"]["after"]["value"] == 1
    )


def continuation(folder, text):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    return tokenizer.decode(
        decoding.continue_greedily(model, ids, 6, decoding.end_tokens(model, tokenizer)), skip_special_tokens=True
    )


@needs_harness
def test_task_alone_and_its_first_examples(cli, folder, small, task):
    code, out, err = cli("eval", folder, *small, "--tasks", task, "--task-limit", 3)
    assert code == 0 and not err, err
    assert "tiny_colours, acc" in out and "at most 3 examples a task" in out


@needs_harness
@pytest.mark.parametrize("content", ["task: [", "task: tiny\ndataset_path: json\n", "no: task\n"])
def test_task_file_that_is_none(cli, folder, small, task, content):
    task.write_text(content)
    code, out, err = cli("eval", folder, *small, "--tasks", task)
    assert code == INPUT and not out and len(err.splitlines()) == 1 and "tiny.yaml" in err


@needs_harness
@pytest.mark.parametrize("name", [pytest.param("no_such_task", marks=pytest.mark.slow), "nowhere.yaml"])
def test_no_such_task(cli, folder, small, name):
    code, out, err = cli("eval", folder, *small, "--tasks", name)
    assert code == INPUT and not out and len(err.splitlines()) == 1 and name in err


def test_without_the_harness(cli, folder, small, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    code, out, err = cli("eval", folder, *small, "--tasks", "arc_easy")
    assert code == USAGE and not out and len(err.splitlines()) == 1 and "lm_eval>=0.4.13" in err
