"""Self-generated texts begin with their prompts, follow the chat template in dialogues, and are free elsewhere."""

import pico
import pytest
import torch

from mla_convert.method.calibrate import openings, self_generated
from mla_convert.method.calibrate.openings import LONGEST_TURN, Openings, Script, varied
from mla_convert.source.chat import Turns, turns
from mla_convert.source.source import open_source

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


@pytest.fixture
def tokenizer():
    found = pico.tokenizer()
    found.chat_template = TEMPLATE
    return found


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_parts_of_a_chat_template(tokenizer):
    found = turns(tokenizer, first=1)
    assert found.head == ids(tokenizer, "<user>") and found.after_user == ids(tokenizer, "</s><assistant>")
    assert found.after_assistant == ids(tokenizer, "</s><user>")
    tokenizer.chat_template = "<s>" + TEMPLATE
    assert turns(tokenizer, first=1).head == ids(tokenizer, "<user>")  # the prefix is not repeated
    for broken in (None, "{{ raise_exception('no') }}", "hello", "{% for m in messages %}{{ m.content }}{% endfor %}"):
        tokenizer.chat_template = broken
        assert turns(tokenizer, first=1) is None


def run(script, drawn):
    """Tokens of the texts where `drawn` (N, T) were sampled."""
    script = script.to(torch.device("cpu"))
    return torch.cat([script.direct(step, drawn[:, step : step + 1]) for step in range(drawn.shape[1])], dim=1)


def test_prompts_come_first_and_sampled_tokens_follow():
    script = Script([[7, 8], [], [9]], torch.ones(3), torch.zeros(3, dtype=torch.bool), None, 5)
    drawn = torch.arange(20, 35).view(3, 5)
    assert run(script, drawn).tolist() == [[7, 8, 22, 23, 24], [25, 26, 27, 28, 29], [9, 31, 32, 33, 34]]
    # a prompt longer than the text is cut
    assert run(
        Script([[1, 2, 3]], torch.ones(1), torch.zeros(1, dtype=torch.bool), None, 2), drawn[:1, :2]
    ).tolist() == [[1, 2]]


def test_the_other_side_answers():
    tails = Turns([50], [2, 60, 61], [2, 70])
    script = Script([[50], []], torch.ones(2), torch.tensor([True, False]), tails, 12)
    drawn = torch.full((2, 12), 5)
    drawn[:, 2] = drawn[:, 7] = 2  # the end of a turn
    drawn[:, 8] = drawn[:, 3] = 2  # ignored: the template's tokens are there
    found = run(script, drawn)
    assert found[0].tolist() == [50, 5, 2, 60, 61, 5, 5, 2, 70, 5, 5, 5]
    assert torch.equal(found[1], drawn[1])  # not a dialogue


def test_a_turn_that_does_not_end_is_ended():
    script = Script([[]], torch.ones(1), torch.tensor([True]), Turns([], [2], [2, 70]), LONGEST_TURN + 200)
    found = run(script, torch.full((1, LONGEST_TURN + 200), 5))[0].tolist()
    assert found.index(2) == LONGEST_TURN and found.count(2) == 1  # an answer may have any length


def test_unlikely_tokens_are_left_out():
    script = Script([[], []], torch.tensor([0.0, 0.1]), torch.zeros(2, dtype=torch.bool), None, 40).to(
        torch.device("cpu")
    )
    found = script.likely(torch.tensor([[0.6, 0.35, 0.05], [0.6, 0.35, 0.05]]))
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.35), pytest.approx(0.05)],
                              [pytest.approx(0.6), pytest.approx(0.35), 0]]  # fmt: skip


def test_repetitive_texts_are_dropped():
    texts = torch.stack(
        [torch.arange(20), torch.ones(20, dtype=torch.int64), torch.arange(20) % 3, torch.arange(20, 40)]
    )
    assert torch.equal(varied(texts, 2), texts[[0, 3]]) and torch.equal(varied(texts, 3), texts[[0, 2, 3]])
    assert torch.equal(varied(texts, 4), texts)


def test_texts_have_openings_of_many_kinds(tokenizer):
    (first, second) = Openings(tokenizer, 1, 0).scripts(150, 80, 64)
    assert first.ids.shape[0] == second.ids.shape[0] == 80  # the last one is padded
    dialogue = torch.cat([first.dialogue, second.dialogue]).float().mean()
    bare = torch.cat([(each.ids[:, 0] < 0) for each in (first, second)]).float().mean()
    assert float(dialogue) == pytest.approx(0.3, abs=0.02) and float(bare) == pytest.approx(0.3, abs=0.02)
    begun = {tuple(row.tolist()) for row in first.ids}
    floors = {round(floor, 3) for floor in first.min_p.flatten().tolist()}
    assert len(begun) > 20 and floors == set(openings.MIN_P)
    again = Openings(tokenizer, 1, 0).scripts(150, 80, 64)[0]
    assert torch.equal(again.ids, first.ids) and torch.equal(again.min_p, first.min_p)
    tokenizer.chat_template = None
    assert not Openings(tokenizer, 1, 0).scripts(10, 10, 64)[0].dialogue.any()


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_the_model_continues_its_openings(sources, tokenizer, name):
    """Texts of several rounds, and in several parts of a window, begin with their openings and are reproducible."""
    model = self_generated.load_whole(open_source(str(sources(name))), torch.device("cpu"))
    made = Openings(tokenizer, 1, 3)
    texts = self_generated.write(model, 12, 24, first=1, seed=3, openings=made)
    assert texts.shape == (12, 24) and torch.equal(texts, self_generated.write(model, 12, 24, 1, 3, openings=made))
    head = ids(tokenizer, "<user>")
    assert (texts[:, : len(head)] == torch.tensor(head)).all(1).any()
    assert not torch.equal(texts, self_generated.write(model, 12, 24, first=1, seed=3))
