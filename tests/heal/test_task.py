"""`--for-task`: conversations to heal on, of which the loss counts the answers alone."""

import gzip
import json
from pathlib import Path

import numpy as np
import pico
import pytest
import torch

from mla_convert.core.errors import InputError
from mla_convert.core.progress import Progress
from mla_convert.heal import HealConfig, HealSettings, heal
from mla_convert.heal.data import add_generated, make_corpus, open_corpus
from mla_convert.heal.teacher_student import TeacherStudent
from mla_convert.heal.windows import cut
from mla_convert.modeling.loss_terms import IGNORED
from mla_convert.source.conversations import answers, load_conversations
from mla_convert.source.load_model import find_model, load_model

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "Bye"},
]


def texts(tokenizer, row):
    """What counts of a row and what does not, in words."""
    ((ids, marks),) = answers([(row, "here")], tokenizer)
    parts, last = [], None
    for token, mark in zip(ids, marks, strict=True):
        if mark != last:
            parts.append(([], mark))
        parts[-1][0].append(token)
        last = mark
    return [(tokenizer.decode(part), mark) for part, mark in parts]


@pytest.fixture
def tokenizer():
    found = pico.tokenizer()
    found.chat_template = TEMPLATE
    return found


def test_answers_are_told_from_the_rest(tokenizer):
    found = texts(tokenizer, {"messages": TALK})
    assert [text for text, mark in found if mark] == ["Two.</>", "Three.</>"]
    assert found[0][0].endswith("<system>Be brief.</><user>One?</><assistant>")
    assert found[2] == ("<user>And?</><assistant>", False) and len(found) == 4  # nothing behind the last answer
    pair = texts(tokenizer, {"prompt": "One?", "completion": "Two."})
    assert [text for text, mark in pair if mark] == ["Two.</>"]
    assert texts(tokenizer, {"prompt": TALK[:2], "completion": TALK[2:3]}) == found[:2]


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_answer(tokenizer):
    # as Qwen3 does with the reasoning of earlier answers
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if loop.last or message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}",
    )
    found = texts(tokenizer, {"messages": TALK})
    assert [text for text, mark in found if mark] == ["Three.</>"]


def test_without_a_template_prompt_and_completion_follow_each_other():
    tokenizer = pico.tokenizer()
    found = texts(tokenizer, {"prompt": "One? ", "completion": "Two."})
    assert found[-1][1] and found[-1][0].startswith("Two.") and not found[0][1] and found[0][0].endswith("One? ")
    with pytest.raises(InputError, match="no chat template for here"):
        texts(tokenizer, {"messages": TALK})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "One"}, "here is no conversation"),
        ([], "here is no conversation"),
        ({"messages": "One"}, "here is no conversation"),
        ({"messages": [{"role": "user"}]}, "here is no conversation"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "here is no conversation"),
        ({"messages": TALK[:2]}, "here has no answer"),
        ({"prompt": "One?"}, "here is no conversation"),
        ({"prompt": "One?", "completion": ""}, "here has no answer"),
        ({"prompt": "One\ud800?", "completion": "Two."}, r"here has half of a surrogate pair \(\\ud800\)"),
        ({"messages": TALK[2:]}, "here begins with an answer"),
    ],
)
def test_other_rows_are_refused(tokenizer, row, words):
    with pytest.raises(InputError, match=words):
        list(answers([(row, "here")], tokenizer))
    if "completion" in row:
        with pytest.raises(InputError, match=words):
            list(answers([(row, "here")], pico.tokenizer()))


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for message in messages %}{{ message['role'] }}{% endfor %}!"]
)
def test_a_template_that_does_not_serve_is_refused(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template"):
        list(answers([({"messages": TALK}, "here")], tokenizer))


def test_files(tmp_path):
    rows = [{"prompt": "One?", "completion": "Two."}, {"messages": TALK}]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "b.json", "c.jsonl.gz"):
        found, label = load_conversations(str(tmp_path / name))
        assert [row for row, _ in found] == rows and label == name
    (tmp_path / "d.txt").write_text("One?")
    (tmp_path / "e.jsonl").write_text("\n")
    for name, words in (("d.txt", "no .jsonl or .json file"), ("e.jsonl", "is empty"), ("f.jsonl", "not found")):
        with pytest.raises(InputError, match=words):
            load_conversations(str(tmp_path / name))


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "task.jsonl"
    rows = [{"prompt": f"What is {n} and one? ", "completion": f"{n} and one is {n + 1}. "} for n in range(200)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_a_window_counts_answers_alone(task, tmp_path, sources):
    text = sources("llama").parent / "text.txt"
    tokenizer = pico.tokenizer()
    labels = make_corpus(str(text), tokenizer, 8000, tmp_path / "corpus", task=str(task))
    found = open_corpus(tmp_path / "corpus")
    assert labels == ["text.txt", "task.jsonl"] and [label for label, _ in found.held] == labels
    assert len(found.counted) == len(found.ids) and 0.4 < (~found.counted).sum() / 4000 < 0.75
    first = np.flatnonzero(~found.counted)[0]
    assert first > 3000 and found.counted[:first].all()  # half of the corpus is the text, all of which counts
    batch = cut(found, [0, int(first)], 64)
    assert batch.counted[0].all()
    counts = found.counted[first + 1 : first + 64]
    assert batch.counted[1, :-1].tolist() == counts.tolist()
    assert ((batch.labels[1, :-1] != IGNORED).numpy() <= counts).all() and (batch.labels[1] != IGNORED).any()
    assert cut(found, [0, 64], 64).counted is None
    add_generated(tmp_path / "corpus", np.full(100, 7))
    assert open_corpus(tmp_path / "corpus").counted[:100].all()


def test_few_conversations_come_several_times(task, tmp_path, sources):
    task.write_text("".join(task.read_text().splitlines(keepends=True)[:4]))
    text = sources("llama").parent / "text.txt"
    make_corpus(str(text), pico.tokenizer(), 4000, tmp_path / "corpus", task=str(task))
    found = open_corpus(tmp_path / "corpus")
    ends = dict(found.held)
    begin = int(np.flatnonzero(~found.counted)[0])
    once = (found.train_end - begin) // 8
    assert found.train_end - begin == 8 * once and ends["task.jsonl"] < once / 4
    passes = found.ids[begin : found.train_end].reshape(8, once)
    assert (passes == passes[0]).all() and (
        found.counted[begin : found.train_end].reshape(8, once) == found.counted[begin : begin + once]
    ).all()
    starts = found.starts[(found.starts >= begin) & (found.starts < found.train_end)]
    assert (starts.reshape(8, -1) - begin - once * np.arange(8)[:, None] == starts[: len(starts) // 8] - begin).all()


def test_many_conversations_are_taken_from_everywhere(tmp_path, sources):
    """A file is often in the order of its subjects: the first of them would be all that is trained on."""
    file = tmp_path / "task.jsonl"
    rows = [
        {"prompt": "What? ", "completion": f"{'later' if n >= 2000 else 'early'} answer {n}. "} for n in range(4000)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = pico.tokenizer()
    make_corpus(str(sources("llama").parent / "text.txt"), tokenizer, 4000, tmp_path / "corpus", task=str(file))
    words = tokenizer.decode(open_corpus(tmp_path / "corpus").ids)
    early, later = words.count("early"), words.count("later")
    assert min(early, later) > 10 and later / early > 0.7  # a tenth more than is needed, of which the first are taken


def test_tokens_that_do_not_count_have_no_gradient(convert_pico, sources):
    converted, settings = convert_pico("llama", rank=16, rope_dim=6).out, HealSettings(ce_weight=0.5)
    models = [
        load_model(find_model(str(name)), torch.float32, torch.device("cpu")) for name in (converted, sources("llama"))
    ]
    pair = TeacherStudent.build(*models, settings, torch.float32)
    ids = torch.arange(40).view(2, 20) % 30 + 5
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORED)], dim=1)
    counted = torch.zeros(2, 20, dtype=torch.bool)
    counted[0, 3:7] = True

    def loss(**given):
        return pair(ids, torch.where(counted, labels, IGNORED) if given else labels, **given)

    every, sums = pair(ids, labels)
    all_counted = pair(ids, labels, counted=torch.ones_like(counted))
    torch.testing.assert_close(all_counted, (every, sums))
    some, terms = loss(counted=counted)
    # what follows the last counted position changes nothing; the mean is over all positions
    shorter = pair(ids[:1, :7], torch.where(counted, labels, IGNORED)[:1, :7], counted=counted[:1, :7])
    torch.testing.assert_close(terms * 40, shorter[1] * 7, rtol=1e-4, atol=1e-5)
    assert 0 < some < every
    none, _ = loss(counted=torch.zeros_like(counted))
    none.backward()
    trained = [p for p in pair.parameters() if p.requires_grad]
    assert none == 0 and all(p.grad is not None and not p.grad.any() for p in trained)


def test_heal_for_a_task(small, task, tmp_path):
    report = heal(HealConfig(**small | {"for_task": str(task), "out": tmp_path / "out"}))
    assert report.heal.text == "text.txt; answers of task.jsonl"
    assert set(report.heal.curve[0]["kinds"]) == {"text.txt", "task.jsonl"}
    assert report.heal.curve[-1]["kinds"]["task.jsonl"] < report.heal.curve[0]["kinds"]["task.jsonl"]
    assert str(tmp_path) not in (tmp_path / "out" / "report.json").read_text()


def test_windows_without_an_answer_measure_nothing(small, tmp_path, capsys):
    """Long prompts with short answers: of the held-out windows, those with an answer are taken, and without one no KL is told."""
    words = Path(small["data"]).read_text()
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": words, "completion": "ok"}) for _ in range(3)))
    notes = []
    progress = Progress(quiet=True)
    progress.note = notes.append
    report = heal(HealConfig(**small | {"for_task": str(file), "out": tmp_path / "out"}), progress)
    assert all("kinds" not in point for point in report.heal.curve)
    assert "long.jsonl is too short for a held-out window with an answer: its KL is not watched" in notes


def test_the_command_refuses_in_one_line(small, tmp_path, cli):
    (tmp_path / "rows.jsonl").write_text('{"text": "One"}\n')
    code, out, err = cli("heal", small["folder"], "--teacher", small["teacher"], "--for-task", tmp_path / "rows.jsonl",
                         "--tokens", "4k", "--length", "64", "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    assert code == 4 and "line 1 of rows.jsonl is no conversation" in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()
