"""A model from its plan to a Hub on loopback, and back into a process without mla_convert."""

import json
import os
import subprocess
import sys

import pytest

from mla_convert.source.checkpoint.reader import SafetensorsReader

REPO = "my-org/demo-mla"
# Runs without mla_convert: huggingface_hub downloads weights and code, and transformers runs them.
LOAD = """
import json, sys
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("mla_convert", "mla_recipes", "mla_demo"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = tokenizer(["The people of the islands"], return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
print(json.dumps({"class": type(model).__name__, "rank": model.config.kv_lora_rank, "text": tokenizer.decode(tokens)}))
"""


@pytest.fixture(params=["one process", pytest.param("a process each", marks=pytest.mark.slow)])
def mla(request, hub, cli, tmp_path, monkeypatch):
    """Run mla-convert in an empty folder: (exit code, stdout, stderr). A separate process mostly imports, so it is slow."""
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1",
                        "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path / "home")}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return cli if request.param == "one process" else lambda *words: shell("-m", "mla_convert", *words)


def shell(*words):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=os.environ)
    return done.returncode, done.stdout, done.stderr


def test_from_plan_to_the_hub_and_back(mla, hub, tmp_path):
    code, out, err = mla("plan", "demo", "--kv-ratio", "0.5", "--gpu", "l4", "--json")
    plan = json.loads(out)
    assert code == 0, err
    assert plan["cache"]["share_saved"] == 0.5 and plan["time"]["cpu"]["seconds"][0] > 0

    settings = ("--kv-ratio", "0.5", "--calib-samples", "8", "--calib-length", "64", "--refine-steps", "4",
                "--eval-windows", "2", "--eval-length", "128", "--device", "cpu")  # fmt: skip
    code, out, err = mla("demo", *settings)
    assert code == 0 and "perplexity" in out, err
    folder = tmp_path / "work" / "demo-mla"
    report = json.loads((folder / "report.json").read_text())
    sizes = "numbers_per_token_per_layer"  # ranks are allocated by measured sensitivity
    assert report["cache"][sizes] == plan["cache"][sizes]
    weights = sum(tensor.nbytes for tensor in _tensors(folder).values())
    assert weights == pytest.approx(plan["disk_bytes"], rel=0.05)

    code, out, err = mla("eval", "demo-mla", "--against", "demo", "--json")
    measured = json.loads(out)["evaluation"]
    # The report's is in float32, layer by layer, this one in the model's bfloat16: processors round its products differently.
    assert code == 0 and measured["ratio"] == pytest.approx(report["evaluation"]["ratio"], rel=3e-3), err

    limits = ("--min-kv-saving", "50%", "--junit", "gate.xml")
    code, out, err = mla("gate", "demo-mla", "--max-ppl-ratio", "1.5", *limits)
    assert code == 0 and out.count("pass") == 2 and "against mla_demo" in out, err
    code, out, err = mla("gate", "demo-mla", "--max-ppl-ratio", "1.0001", "--from-report", *limits)
    assert code == 3 and "FAIL" in out and 'failures="1"' in (tmp_path / "work" / "gate.xml").read_text()

    code, out, err = mla("push", "demo-mla", REPO, "--max-ppl-ratio", "1.0001", "--from-report")
    assert code == 3 and not hub.repos, err
    code, out, err = mla("push", "demo-mla", REPO, "--private", "--max-ppl-ratio", "1.5", "--from-report")
    assert code == 0 and f"{hub.url}/{REPO}" in out, err
    assert hub.repos[REPO].private
    card = hub.files(REPO)["README.md"].decode()
    assert "license: cc-by-4.0" in card and f'from_pretrained("{REPO}"' in card

    code, out, err = shell("-c", LOAD, REPO)
    assert code == 0, err
    loaded = json.loads(out)
    assert loaded["class"] == "MlaLlamaForCausalLM" and loaded["rank"] == max(
        layer["kv_lora_rank"] for layer in report["layers"]
    )
    assert loaded["text"].startswith("The people of the islands") and len(loaded["text"]) > 30

    # the model on the Hub can be inspected and gated by its name
    code, out, err = mla("inspect", REPO, "--json")
    assert code == 0 and json.loads(out)["report"]["perplexity_ratio"] == report["evaluation"]["ratio"], err
    code, out, err = mla("gate", REPO, "--from-report", "--min-kv-saving", "50%")
    assert code == 0, err


def _tensors(folder):
    reader = SafetensorsReader(folder)
    return reader.read(reader.names())
