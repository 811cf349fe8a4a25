"""Hundreds of damaged inputs (-m slow: thousands): each is read correctly, or refused in one line that a user can act on."""

import gzip
import json
import random
from functools import partial
from pathlib import Path

import pico
import pytest
import torch
from mutate import Case, mutated_bytes, mutated_json, mutated_safetensors, run_cases

from mla_convert.core.errors import InputError
from mla_convert.source.text_files import read_documents

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE_FAILED = 3
FAMILIES = ("llama", "gpt2", "gemma3", "mixtral")
# Kinds of input, and the number of each for one seed; by default a third of the first seed's.
COUNTS = {"config": 400, "index": 150, "header": 200, "tokenizer": 150, "tokenizer_config": 100, "gguf": 100, "recipe": 350,
          "report": 400, "converted config": 250}  # fmt: skip
RECIPE = """description: A test's recipe.
source: SOURCE
aliases: [mutant]
settings:
  rank: 16
  rope_dim: 8
  calib_samples: 4
  calib_noise: 0.3
  uniform: true
  rope_selection: by_loss
"""


@pytest.fixture(scope="module")
def inputs(sources, convert_pico, tmp_path_factory):
    """Undamaged inputs of every kind, by name."""
    place = tmp_path_factory.mktemp("inputs")
    found = {family: sources(family) for family in FAMILIES}
    found["shards"] = pico.save("llama", place / "shards", max_shard_size="60KB")
    found["gguf"] = pico.save_gguf(place / "model.gguf")
    found["converted"] = Path(convert_pico("llama", rank=10, rope_dim=6).out)
    return found


def copied(source: Path, folder: Path, file: str, content: bytes) -> Path:
    """The source with one file replaced; the others are linked."""
    place = folder / source.name
    place.mkdir()
    for path in source.iterdir():
        if path.name != file:
            (place / path.name).symlink_to(path)
    (place / file).write_bytes(content)
    return place


def replaced(source: Path, file: str, content: bytes, folder: Path) -> list[str]:
    return ["inspect", str(copied(source, folder, file, content)), "-q"]


def logits_of(model):
    ids = torch.arange(4, 20)[None] % model.config.vocab_size
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


def differ(ours, theirs):
    """The difference of two models' logits in words, or None."""
    if ours.shape != theirs.shape or not torch.equal(ours.isfinite(), theirs.isfinite()):
        return "logits differ in shape or in what is finite"
    known = theirs.isfinite()
    if not known.any():
        return None
    gap = float((ours - theirs)[known].abs().max())
    return f"logits differ by {gap}" if gap > 1e-3 * float(theirs[known].abs().max()) else None


def same_as_transformers(whole: Path, folder: Path, out: str) -> str | None:
    """The error of an accepted mutated source: it must equal the model that transformers loads, or the undamaged one."""
    from transformers import AutoModelForCausalLM

    from mla_convert.method.calibrate.self_generated import load_whole
    from mla_convert.source.source import open_source

    (source,) = [path for path in folder.iterdir() if path.is_dir()]
    ours = logits_of(load_whole(open_source(str(source)), torch.device("cpu")))
    try:
        theirs, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        theirs, info = load_whole(open_source(str(whole)), torch.device("cpu")), {}
        said = f"transformers says {type(error).__name__} {str(error)[:100]}, and "
        return (wrong := differ(ours, logits_of(theirs))) and said + wrong
    if info["missing_keys"]:
        return f"transformers makes up {min(info['missing_keys'])}"
    return differ(ours, logits_of(theirs))


def passed_rightly(limit: float, folder: Path, out: str) -> str | None:
    """Whether a gate that passed had a measured value."""
    value = json.loads((folder / "converted" / "report.json").read_text())["evaluation"]["after"]["value"]
    return None if isinstance(value, int | float) and 0 < value <= limit * (1 + 1e-6) else f"passed on {value!r}"


def config_case(inputs, draw, number):
    family = FAMILIES[number % len(FAMILIES)]
    source = inputs[family]
    content = mutated_json((source / "config.json").read_text(), draw)
    return Case(
        f"config {number} of {family}",
        partial(replaced, source, "config.json", content),
        partial(same_as_transformers, source),
    )


def index_case(inputs, draw, number):
    content = mutated_json((inputs["shards"] / INDEX).read_text(), draw)
    return Case(
        f"index {number}",
        partial(replaced, inputs["shards"], INDEX, content),
        partial(same_as_transformers, inputs["shards"]),
    )


def header_case(inputs, draw, number):
    content = mutated_safetensors((inputs["llama"] / WEIGHTS).read_bytes(), draw)
    return Case(
        f"header {number}",
        partial(replaced, inputs["llama"], WEIGHTS, content),
        partial(same_as_transformers, inputs["llama"]),
    )


def tokenizer_case(inputs, draw, number, file="tokenizer.json"):
    content = mutated_json((inputs["llama"] / file).read_text(), draw)
    return Case(f"{file} {number}", partial(replaced, inputs["llama"], file, content))


def gguf_case(inputs, draw, number):
    whole = inputs["gguf"].read_bytes()
    head = whole.index(b"blk.0") + 4000  # header, metadata, tokens and the first names of tensors
    content = mutated_bytes(whole[:head], draw) + whole[head:]

    def make(folder: Path) -> list[str]:
        (folder / "model.gguf").write_bytes(content)
        return ["inspect", str(folder / "model.gguf"), "-q"]

    return Case(f"gguf {number}", make)


def recipe_case(inputs, draw, number):
    text = RECIPE.replace("SOURCE", str(inputs["llama"])).encode()
    scalars = ["!!float x", "!!int ''", "2001-99-99", "9" * 5000, "0x", "*a", "&a [*a]", "{{}}", "!!python/object:os.system x",
               "- -", "[" * 2000, "\x00", "null", "1e400", ".nan", "-1", "[]", "|\n    x", "'", "\ud800"]  # fmt: skip
    if number % 2:
        lines = text.split(b"\n")
        place = draw.randrange(len(lines) - 1)
        value = draw.choice(scalars).encode("utf-8", "surrogatepass")
        lines[place] = lines[place].partition(b":")[0] + b": " + value
        content = b"\n".join(lines)
    else:
        content = mutated_bytes(text, draw)

    def make(folder: Path) -> list[str]:
        (folder / "recipe.yaml").write_bytes(content)
        return [*draw_of(number, ["recipes show", "plan -q"]).split(), str(folder / "recipe.yaml")]

    return Case(f"recipe {number}", make)


def draw_of(number, choices):
    return choices[number // 2 % len(choices)]


def report_case(inputs, draw, number):
    content = mutated_json((inputs["converted"] / "report.json").read_text(), draw)
    command = ["inspect", "gate", "report"][number % 3]

    def make(folder: Path) -> list[str]:
        copied(inputs["converted"], folder, "report.json", content).rename(folder / "converted")
        more = {"gate": ["--from-report", "--max-ppl", "1e9"], "inspect": ["-q"],
                "report": ["--html", str(folder.parent / "page.html")]}  # fmt: skip
        return [command, str(folder / "converted"), *more[command]]

    return Case(
        f"{command} of report {number}", make, partial(passed_rightly, 1e9) if command == "gate" else lambda *_: None
    )


def converted_case(inputs, draw, number):
    content = mutated_json((inputs["converted"] / "config.json").read_text(), draw)
    command = ["inspect", "verify"][number % 2]

    def make(folder: Path) -> list[str]:
        return [command, str(copied(inputs["converted"], folder, "config.json", content)), "-q"]

    return Case(f"{command} of converted config {number}", make)


MAKERS = {"config": config_case, "index": index_case, "header": header_case, "tokenizer": tokenizer_case,
          "tokenizer_config": partial(tokenizer_case, file="tokenizer_config.json"), "gguf": gguf_case, "recipe": recipe_case,
          "report": report_case, "converted config": converted_case}  # fmt: skip


def wrong_ones(kind, inputs, seed, count):
    draw = random.Random(f"{kind} {seed}")
    cases = [MAKERS[kind](inputs, draw, number) for number in range(count)]
    return run_cases(cases, codes=(0, 2, GATE_FAILED, 4, 5) if kind == "report" else (0, 2, 4, 5))


@pytest.mark.parametrize("kind", MAKERS)
def test_every_mutation_is_taken_rightly_or_refused_in_a_line(kind, inputs):
    wrong = wrong_ones(kind, inputs, 0, COUNTS[kind] // 3)
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(11))
@pytest.mark.parametrize("kind", MAKERS)
def test_many_more_mutations(kind, seed, inputs):
    wrong = wrong_ones(kind, inputs, seed, COUNTS[kind])
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])


def test_mutated_texts_are_read_or_refused(tmp_path):
    draw, plain = random.Random(0), pico.text(1500)
    rows = "".join(json.dumps({"text": part}) + "\n" for part in plain.split("\n") if part).encode()
    wholes = {"t.jsonl": rows, "t.json": b"[" + rows.strip().replace(b"\n", b",") + b"]", "t.txt": plain.encode(),
              "t.csv": b"text\n" + plain.encode(), "t.jsonl.gz": gzip.compress(rows),
              "t.txt.gz": gzip.compress(plain.encode())}  # fmt: skip
    for number in range(1500):
        name, whole = draw.choice(list(wholes.items()))
        (tmp_path / name).write_bytes(mutated_bytes(whole, draw))
        try:
            found = read_documents(tmp_path / name)
        except InputError as refused:
            assert name in str(refused) and "\n" not in str(refused) and len(str(refused)) < 500, number
        else:
            assert all(
                isinstance(text, str) and text.encode("utf-8") is not None and "\0" not in text for text in found
            ), number
