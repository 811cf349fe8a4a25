"""`mla-convert sweep`: points, the frontier, the choice by held-out text, and going on where a run was stopped."""

import json
import re
import shutil

import pico
import pytest
import torch

import mla_convert.pipeline.sweep
from mla_convert.pipeline.sweep import SweepRun
from mla_convert.write.verify import verify

GATE, INPUT, USAGE, RESOURCES, INTERRUPTED = 3, 4, 2, 5, 130
SHARES = (0.75, 0.5, 0.25)


@pytest.fixture
def run(cli, sources, tmp_path):
    text = sources("llama").parent / "text.txt"
    small = ("--calib", text, "--eval", text, "--calib-samples", 8, "--calib-length", 32, "--eval-windows", 4,
             "--eval-length", 32, "--refine-steps", 0, "--uniform", "--device", "cpu", "-q")  # fmt: skip

    def sweep(*options, folder=tmp_path / "sweep"):
        shares = ("--kv-ratios", ",".join(map(str, SHARES)))
        return cli("sweep", sources("llama"), *shares, "--folder", folder, *small, *options)

    return sweep


def content(folder):
    return json.loads((folder / "sweep.json").read_text())


def shards(folder):
    return json.loads((folder / "report.json").read_text())["checksums"]


@pytest.fixture
def conversions(monkeypatch):
    """Names of the points that are really converted."""
    made, real = [], mla_convert.pipeline.sweep.convert

    def convert(config, progress):
        made.append(config.out.name)
        return real(config, progress)

    monkeypatch.setattr(mla_convert.pipeline.sweep, "convert", convert)
    return made


def test_frontier(run, tmp_path):
    code, out, err = run()
    assert code == 0 and not err
    found = content(tmp_path / "sweep")
    assert [entry["share"] for entry in found["points"]] == list(SHARES)
    for entry in found["points"]:
        assert entry["numbers"] == entry["rank"] + entry["rope_dim"] == 32 * entry["share"]
        assert entry["ratio"] == entry["evaluation"]["ratio"] and entry["stderr"] > 0
        assert entry["held_out"]["text"] == "the end of text.txt" and entry["held_out"]["ratio"] != entry["ratio"]
        assert f"{entry['rank']} + {entry['rope_dim']}" in out and f"×{entry['ratio']:.4f}" in out
    assert found["chosen"] is None
    # conversions are gone, the figures stay, and no figure names a path
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["sweep.html", "sweep.json"]
    assert str(tmp_path) not in (tmp_path / "sweep" / "sweep.json").read_text()
    html = (tmp_path / "sweep" / "sweep.html").read_text()
    # perplexity ratio and KL, each for a desktop and for a phone
    assert html.count("<svg") == 4 and html.count("<tr>") == 4 and not re.search(r'(?:src|href)="(?!data:)', html)


def test_choice_is_by_the_held_out_text_and_written_whole(run, conversions, tmp_path):
    run()
    points = content(tmp_path / "sweep")["points"]
    limit = sorted(entry["held_out"]["ratio"] for entry in points)[1] + 1e-6
    smallest = min((e for e in points if e["held_out"]["ratio"] <= limit), key=lambda e: e["numbers"])
    conversions.clear()
    out = tmp_path / "new" / "out"
    code, said, err = run("--max-ppl-ratio", limit, "--out", out)
    assert code == 0, err
    assert conversions == [smallest["name"]]  # measured before, not kept
    assert content(tmp_path / "sweep")["chosen"] == smallest["name"] and "smallest cache within" in said
    verify(out)
    report = json.loads((out / "report.json").read_text())
    assert report["evaluation"]["ratio"] == smallest["ratio"]
    assert report["sweep"] == [
        {**{key: e[key] for key in ("numbers", "share", "ratio", "stderr")}, "kl": e["evaluation"]["kl"]}
        for e in points
    ]
    assert (
        "The frontier" in (out / "report.html").read_text() and "this conversion" in (out / "report.html").read_text()
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_original_is_measured_once_and_drawn_beside_all_sizes(run, conversions, tmp_path):
    options, out = ("--original-cache", "int8,int4", "--max-ppl-ratio", 100), tmp_path / "out"
    code, said, err = run(*options, "--out", out)
    assert code == 0, err
    points = content(tmp_path / "sweep")["points"]
    assert [bool(point["original_cache"]) for point in points] == [True, False, False]
    report = json.loads((out / "report.json").read_text())
    assert report["original_cache"] == points[0]["original_cache"] and len(report["sweep"]) == 3
    for html in ((tmp_path / "sweep" / "sweep.html").read_text(), (out / "report.html").read_text()):
        assert "Quality at equal bytes" in html and "original, INT4 cache" in html and "latents, not quantised" in html
        assert html.count("<polygon") == 2 * 2
    assert "original, INT8 cache" in said
    conversions.clear()
    assert run(*options, "--out", out)[0] == 0 and conversions == [report_name(points, report)]  # chosen, not kept


def report_name(points, report):
    return next(point["name"] for point in points if point["ratio"] == report["evaluation"]["ratio"])


def test_a_choice_that_no_point_meets(run, tmp_path):
    code, out, err = run("--max-ppl-ratio", 0.5, "--out", tmp_path / "out")
    assert code == GATE and "0.5 on the held-out text: the best has ×" in err and "×" in out
    assert len(content(tmp_path / "sweep")["points"]) == len(SHARES) and not (tmp_path / "out").exists()


def test_the_candidate_of_this_run_is_not_converted_twice(run, conversions, tmp_path):
    code, _, err = run("--max-ppl-ratio", 1e6, "--out", tmp_path / "out")
    assert code == 0, err
    assert conversions == [f"kv-{share}" for share in SHARES]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["cache"]["share_saved"] == 0.75
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["sweep.html", "sweep.json"]


def test_interrupted_and_gone_on_with(run, conversions, monkeypatch, tmp_path):
    real = SweepRun.add

    def add(self, number):
        if number == 2:
            raise KeyboardInterrupt
        real(self, number)

    # stopped in its first point, it leaves a folder that is taken for its own
    (tmp_path / "sweep" / ".kv-0.75.partial").mkdir(parents=True)
    monkeypatch.setattr(SweepRun, "add", add)
    code, out, err = run("--keep")
    assert code == INTERRUPTED and not out and "2 of 3 points are in" in err
    monkeypatch.setattr(SweepRun, "add", real)
    conversions.clear()
    assert run("--keep")[0] == 0
    assert conversions == ["kv-0.25"]
    for share in SHARES:
        verify(tmp_path / "sweep" / f"kv-{share}")
    # a kept conversion is what is written if it is chosen
    assert run("--max-ppl-ratio", 1e6, "--out", tmp_path / "out")[0] == 0 and conversions == ["kv-0.25"]
    kept = shards(tmp_path / "sweep" / "kv-0.25")
    assert shards(tmp_path / "out") == kept
    # other settings: nothing of the old ones may be taken for them, nor lost
    assert run("--seeds", 1, "--max-ppl-ratio", 1e6, "--out", tmp_path / "out")[0] == 0
    assert conversions[1:] == [f"kv-{share}" for share in SHARES]
    assert shards(tmp_path / "out") != kept == shards(tmp_path / "sweep" / "kv-0.25")
    assert not (tmp_path / "sweep" / ".work").exists()


def test_rope_dims_and_seeds_and_a_text_to_choose_by(run, sources, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text((sources("llama").parent / "text.txt").read_text()[9000:])
    code, out, err = run("--kv-ratios", "0.5", "--rope-dims", "4,6", "--seeds", "0,1", "--held-out", text, "--json")
    assert code == 0, err
    points = json.loads(out)["points"]
    assert [(e["rope_dim"], e["seed"]) for e in points] == [(4, 0), (4, 1), (6, 0), (6, 1)]
    assert {e["held_out"]["text"] for e in points} == {"other.txt"} and len({e["ratio"] for e in points}) == 4


@pytest.mark.parametrize(
    "options, expected, words",
    [
        (("--out", "x"), USAGE, "--max-ppl-ratio"),
        (("--kv-ratios", "half"), USAGE, "'half' is no list"),
        (("--kv-ratios", "0.5,7"), INPUT, "kv_ratio 7.0 is not a share"),
        (("--rope-dims", "5"), INPUT, "rope_dim 5 is not an even number"),
        (("--max-ppl-ratio", "0"), USAGE, "above 0"),
        (("--device", "cuda:99"), RESOURCES, "cuda"),
        (("--held-out", "nowhere.txt"), INPUT, "held-out text nowhere.txt not found"),
    ],
)
def test_refused_before_anything_is_written(run, tmp_path, options, expected, words):
    code, out, err = run(*options)
    assert code == expected and words in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "sweep").exists()


def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    code, _, err = run(folder=tmp_path / "thesis")
    assert code == INPUT and "holds no sweep" in err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]


def wide(folder, head_dim=64, heads=8):
    """A checkpoint whose cache is wide enough for vLLM's kernels: 1024 numbers per token and layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**pico.COMMON | {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": heads,
                                          "num_key_value_heads": heads, "head_dim": head_dim})  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


def test_for_an_engine(cli, tmp_path):
    """Several fractions lead to one of the engine's few sizes, and some to none: one point a size is left."""
    (tmp_path / "text.txt").write_text(pico.text(8000))
    small = ("--calib", tmp_path / "text.txt", "--eval", tmp_path / "text.txt", "--calib-samples", 8, "--calib-length", 32,
             "--eval-windows", 2, "--eval-length", 32, "--suite-windows", 0, "--refine-steps", 0, "--device", "cpu")  # fmt: skip
    source = wide(tmp_path / "source")
    code, _, err = cli("sweep", source, "--for", "vllm", "--folder", tmp_path / "sweep", *small)
    assert code == 0, err
    points = content(tmp_path / "sweep")["points"]
    assert [(e["kv_ratio"], e["rank"], e["rope_dim"]) for e in points] == [(0.67, 256, 64)]
    assert "kv-0.5 is left out: for vllm its sizes are those of kv-0.67" in err
    assert "kv-0.25 is left out: " in err and "least that vLLM has kernels for is 320" in " ".join(err.split())
    settings = points[0]["settings"]
    assert (settings["engine"], settings["uniform"], settings["rope_selection"]) == ("vllm", True, "engine_table")


def test_for_an_engine_that_no_size_suits(run, tmp_path):
    code, out, err = run("--for", "vllm")
    assert code == INPUT and "the least that vLLM has kernels for" in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "sweep").exists()


def test_export_of_every_point_and_of_the_choice(run, conversions, tmp_path):
    tabled = ("--rope-selection", "engine_table", "--kv-ratios", "0.75,0.5", "--export", "portable")
    code, _, err = run(*tabled)
    assert code == 0, err
    folder = tmp_path / "sweep"
    exported = [json.loads((folder / f"kv-{share}-portable" / "export.json").read_text()) for share in (0.75, 0.5)]
    assert [facts["profile"] for facts in exported] == ["portable"] * 2
    assert not list(folder.glob("kv-*/report.json"))  # conversions are not kept
    conversions.clear()
    shutil.rmtree(folder / "kv-0.5-portable")  # what is gone is made again, and nothing else
    assert run(*tabled)[0] == 0 and conversions == ["kv-0.5"] and (folder / "kv-0.5-portable").is_dir()
    code, _, err = run(*tabled, "--max-ppl-ratio", 1e6, "--out", tmp_path / "out")
    assert code == 0, err
    verify(tmp_path / "out-portable")
    assert (tmp_path / "out" / "report.json").is_file()


def test_export_alone_chooses_what_the_profile_needs(run, tmp_path):
    code, _, err = run("--kv-ratios", "0.75", "--export", "portable", "--max-ppl-ratio", 1e6, "--out", tmp_path / "out")
    assert code == 0, err
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert (settings["uniform"], settings["rope_selection"], settings["engine"]) == (True, "engine_table", None)
    verify(tmp_path / "out-portable")


@pytest.mark.parametrize(
    "options, code, words",
    [
        (("--export", "other"), USAGE, "none of portable, engine, hf-code"),
        (("--export", "portable", "--rope-selection", "by_loss"), USAGE, "needs planes of one table: add --for ENGINE"),
        (("--export", "portable", "--for", "vllm"), INPUT, "the least that vLLM has kernels for"),
    ],
)
def test_an_export_that_cannot_be_is_refused_first(run, tmp_path, options, code, words):
    found, out, err = run(*options)
    assert found == code and words in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "sweep").exists()


def test_several_processes_are_refused(cli, sources, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = []
    monkeypatch.setattr("os._exit", lambda code: ended.append(code))
    _, _, err = cli("sweep", sources("llama"), "--kv-ratios", "0.5")
    assert ended[0] == 2 and "runs in one process" in err
