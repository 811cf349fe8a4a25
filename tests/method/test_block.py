"""Joint refinement of layers: it never makes a model worse, and the model that is evaluated is the one that is written."""

import io
import math

import pico
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from mla_convert import convert
from mla_convert.core import progress
from mla_convert.core.settings import ConvertConfig
from mla_convert.evaluate.quality import perplexity as measure
from mla_convert.method.refine.optimise import RefineSettings
from mla_convert.method.refine.schedule import blocks, groups, layer_numbers, refine_settings
from mla_convert.source import texts
from mla_convert.source.source import open_source
from mla_convert.write.writer import Writer

SMALL = {"kv_ratio": 0.4, "refine_steps": 3, "refine_block": 2}


@pytest.mark.parametrize("layers, size", [(30, 6), (7, 3), (5, 8), (4, 1), (1, 6)])
def test_blocks_cover_all_layers_evenly(layers, size):
    found = blocks(layers, size)
    assert [index for block in found for index in block] == list(range(layers))
    lengths = [len(block) for block in found]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "pythia", "gpt2", "qwen3", "mixtral"])
def test_joint_refinement_lowers_the_error_of_a_block(convert_pico, name):
    report = convert_pico(name, kv_ratio=0.4, refine_steps=0, refine_block=2, block_steps=20, block_lr=0.002)
    together = [layer for layer in report.layers if "block" in layer]
    assert [layer["block"] for layer in together] == [[0, 1], [0, 1]]  # three layers: one block of two, one alone
    for layer in together:
        assert layer["block_error"] < layer["block_error_before"] and layer["block_steps"] == 20


@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2", "cohere"))]
)
def test_output_steps_lower_the_divergence(convert_pico, name):
    settings = {"kv_ratio": 0.3, "refine_steps": 0, "block_steps": 10, "block_lr": 0.02, "calib_samples": 64}
    without, report = (convert_pico(name, refine_block=3, **settings, output_steps=steps) for steps in (0, 60))
    for layer, other in zip(report.layers, without.layers, strict=True):
        assert layer["output_kl"] < layer["output_kl_before"] and layer["output_steps"] == 60
        assert layer["block_error"] == other["block_error"] and "output_kl" not in other
    *others, last = convert_pico(name, **{**settings, "refine_block": 1, "block_steps": 0}, output_steps=60).layers
    assert last["output_kl"] < last["output_kl_before"] and not any("output_kl" in layer for layer in others)


def test_the_last_blocks_form_a_group():
    def sizes(layers, **settings):
        given = {"steps": 1, "batch": 1, "lr": 0.1, "seed": 0, "block": 6, "output_steps": 5, **settings}
        return [[len(block) for block in group] for group in groups(layers, RefineSettings(**given))]

    assert sizes(24) == [[6], [6], [6], [6]] == sizes(24, output_layers=6)
    assert sizes(24, output_layers=7) == [[6], [6], [6, 6]] == sizes(24, output_layers=12)
    assert sizes(24, output_layers=99) == [[6, 6, 6, 6]]
    assert sizes(24, output_layers=99, output_steps=0) == [[6], [6], [6], [6]]


def test_number_of_layers_in_the_output_steps_follows_memory(sources):
    def layers(numbers):
        return refine_settings(
            ConvertConfig(source="x"), torch.device("cuda"), (768, 1024), 1536, numbers
        ).output_layers

    assert layers(0) == 21 and layers(50_000_000) < 21  # for a card of 80 GB, as there is none
    assert layers(10**11) == 1  # experts that fit on no card: the last block alone
    source = open_source(str(sources("llama")))
    found = layer_numbers(source)
    with_biases = [name for name in source.reader.names() if name.startswith("model.layers.0.")]
    assert found == sum(math.prod(source.reader.shape(name)) for name in with_biases)


def test_output_steps_of_several_blocks_lower_the_divergence_further(convert_pico):
    settings = {
        "kv_ratio": 0.3,
        "refine_steps": 0,
        "refine_block": 1,
        "block_lr": 0.02,
        "calib_samples": 64,
        "output_steps": 60,
    }
    last, both = (convert_pico("llama", **settings, output_layers=layers).layers for layers in (1, 2))
    assert [entry.get("output_layers") for entry in last] == [None, None, 1]
    assert [entry.get("output_layers") for entry in both] == [None, 2, 2]
    assert both[-1]["output_kl_before"] == pytest.approx(last[-1]["output_kl_before"], rel=0.02)
    assert both[-1]["output_kl"] < last[-1]["output_kl"]
    report = convert_pico("llama", **settings, output_layers=2)
    windows = texts.evaluation_windows(pico.text(), AutoTokenizer.from_pretrained(report.out), 4, 48, "text")
    expected = measure.perplexity(pico.losses(AutoModelForCausalLM.from_pretrained(report.out), windows))
    assert report.evaluation["after"]["value"] == pytest.approx(expected.value, rel=1e-4)


def test_the_progress_bar_counts_every_step(sources, tmp_path, monkeypatch):
    seen = []

    class Watched(progress.Bars):
        def update(self, task, **given):
            super().update(task, **given)
            seen.append((self.tasks[0].completed, self.tasks[0].total))

        def advance(self, task, count=1):
            super().advance(task, count)
            seen.append((self.tasks[0].completed, self.tasks[0].total))

    monkeypatch.setattr(progress, "Bars", Watched)
    source = sources("llama")
    text = str(source.parent / "text.txt")
    config = ConvertConfig(source=str(source), out=tmp_path / "out", calib=text, eval=text, calib_samples=16,
                           calib_length=48, eval_windows=4, eval_length=48, kv_ratio=0.4, uniform=True, device="cpu",
                           refine_steps=2, refine_block=2, block_steps=3, output_steps=7)  # fmt: skip
    convert(config, progress.Progress(Console(file=io.StringIO(), force_terminal=True)))
    # 3 layers with 2 + 3 steps and one for all other work, and 7 more steps for each layer of the last block
    extra_steps = 7 * len(blocks(3, 2)[-1])
    assert seen[-1] == (3 * 6 + extra_steps, 3 * 6 + extra_steps)
    assert all(done <= total for done, total in seen)


def test_the_evaluated_model_is_the_written_one(convert_pico):
    report = convert_pico("llama", **SMALL, block_steps=30)
    windows = texts.evaluation_windows(pico.text(), AutoTokenizer.from_pretrained(report.out), 4, 48, "text")
    expected = measure.perplexity(pico.losses(AutoModelForCausalLM.from_pretrained(report.out), windows))
    assert report.evaluation["after"]["value"] == pytest.approx(expected.value, rel=1e-4)


def test_exact_stays_exact(convert_pico):
    report = convert_pico("llama", rank="full", rope_dim="full", refine_steps=3, refine_block=3)
    assert report.evaluation["ratio"] == pytest.approx(1, abs=1e-6)


def test_two_runs_give_the_same_bytes(convert_folder, sources):
    first, second = (convert_folder(sources("llama"), **SMALL).out for _ in range(2))
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_killed_between_the_shards_of_a_block(convert_folder, sources, tmp_path, monkeypatch):
    whole = convert_folder(sources("llama"), **SMALL).out
    write, written = Writer.write_shard, []

    def killed(self, file, *rest):
        if len(written) == 3:  # embeddings, head, and the first layer of the first block
            raise KeyboardInterrupt
        written.append(file)
        write(self, file, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            convert_folder(sources("llama"), **SMALL, out=out)
    assert not out.exists()
    convert_folder(sources("llama"), **SMALL, out=out)
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_defaults():
    def found(device, hidden, **settings):
        return refine_settings(ConvertConfig(source="x", **settings), torch.device(device), (768, 1024), hidden)

    assert found("cuda", 576).block > 1 and found("cuda", 576).block_steps == 200 * 768 // 125
    assert found("cuda", 576).output_steps == 200 * 768 // 125 // 4
    assert found("cuda", 576, output_steps=0).output_steps == 0 and found("cuda", 576, output_steps=9).output_steps == 9
    large = found("cuda", 8192)
    assert large.block == 1 and large.block_steps == large.output_steps == 0  # memory
    assert found("cpu", 576).block == 1 and found("cpu", 576, refine_block=4).output_steps == 0
    closed_form = found("cuda", 576, refine_steps=0)
    assert closed_form.steps == closed_form.block_steps == 0
    assert found("cpu", 576, refine_block=4, block_steps=7).block_steps == 7
