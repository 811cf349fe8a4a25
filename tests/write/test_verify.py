"""`verify` accepts what was written and names the first thing that is wrong with anything else."""

import json
import random
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_convert.core.sums import SUMS, CorruptCheckpoint, listed, seal, sha256
from mla_convert.write.verify import verify

INPUT = 4
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{index:05d}-of-00005.safetensors" for index in range(1, 6)]
LAYER = SHARDS[1]
ATTENTION = "model.layers.0.self_attn."
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def folder(convert_pico, tmp_path):
    return shutil.copytree(convert_pico("llama", rank=10, rope_dim=6).out, tmp_path / "converted")


def fault(folder) -> CorruptCheckpoint:
    with pytest.raises(CorruptCheckpoint) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)
    return caught.value


def change_json(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    seal(folder)


def reseal(folder, file):
    """Record a shard's checksum as it is now, everywhere."""
    change_json(folder, "report.json", lambda report: report["checksums"].update({file: sha256(folder / file)}))


def change_tensors(folder, change, file=LAYER):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})
    reseal(folder, file)


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "llama-bias-wide-heads", "mistral-window", "qwen2"])
def test_whole(convert_pico, name):
    found = verify(convert_pico(name, kv_ratio=0.5).out)
    files = list(found.folder.glob("*.safetensors"))
    assert found.shards == len(files) == 5
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert (found.tensors, found.bytes) == (len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


@pytest.mark.parametrize(
    "sizes", [{"rank": "full", "rope_dim": "full"}, {"rank": 8, "rope_dim": 0}, {"dtype": "bfloat16"}]
)
def test_whole_at_the_extremes(convert_pico, sizes):
    assert verify(convert_pico("llama", **sizes).out).shards == 5


@pytest.mark.parametrize("position", [0, 9, -1])
@pytest.mark.parametrize("file", SHARDS)
def test_flipped_byte(folder, file, position):
    content = bytearray((folder / file).read_bytes())
    content[position] ^= 1
    (folder / file).write_bytes(content)
    assert fault(folder).file == file


@pytest.mark.parametrize("file", SHARDS)
def test_missing_shard(folder, file):
    (folder / file).unlink()
    found = fault(folder)
    assert found.file == file and "missing" in str(found)


def test_renamed_shard(folder):
    (folder / LAYER).rename(folder / "model-layer.safetensors")
    assert fault(folder).file == "model-layer.safetensors"


def test_swapped_shards(folder):
    (folder / SHARDS[1]).rename(folder / "kept")
    (folder / SHARDS[2]).rename(folder / SHARDS[1])
    (folder / "kept").rename(folder / SHARDS[2])
    assert fault(folder).file == SHARDS[1]
    reseal(folder, SHARDS[1])
    reseal(folder, SHARDS[2])
    assert fault(folder).file == INDEX


@pytest.mark.parametrize("resealed", [False, True])
@pytest.mark.parametrize("size", [0, 5, 100, -4])
def test_truncated_shard(folder, size, resealed):
    (folder / LAYER).write_bytes((folder / LAYER).read_bytes()[:size])
    if resealed:
        reseal(folder, LAYER)
    assert fault(folder).file == LAYER


@pytest.mark.parametrize("name", ["stray.safetensors", "model.safetensors", "sub/model-00002-of-00005.safetensors"])
def test_stray_shard(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(folder / LAYER, folder / name)
    found = fault(folder)
    assert found.file == name.partition("/")[0] and found.file in str(found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [NORM, f"{ATTENTION}kv_b_proj.weight"])
def test_not_finite(folder, name, value):
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    found = fault(folder)
    assert (found.file, found.tensor) == (LAYER, name)


@pytest.mark.parametrize("value", [-1, 4])
def test_frequency_out_of_range(folder, value):
    name = f"{ATTENTION}rope_freq_index"
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    found = fault(folder)
    assert (found.file, found.tensor) == (LAYER, name)


@pytest.mark.parametrize(
    "name, dtype",
    [
        (NORM, torch.int8),
        (NORM, torch.float8_e4m3fn),
        (NORM, torch.int64),
        (f"{ATTENTION}rope_freq_index", torch.float32),
    ],
)
def test_dtype(folder, name, dtype):
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    found = fault(folder)
    assert (found.file, found.tensor) == (LAYER, name)


def test_shape(folder):
    change_tensors(folder, lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()}))
    found = fault(folder)
    assert (found.file, found.tensor) == (LAYER, NORM) and "[47]" in str(found) and "[48]" in str(found)


def test_tensor_dropped_from_the_index(folder):
    change_json(folder, INDEX, lambda index: index["weight_map"].pop(NORM))
    found = fault(folder)
    assert (found.file, found.tensor) == (INDEX, NORM)


def test_tensor_dropped_from_its_shard(folder):
    change_tensors(folder, lambda tensors: tensors.pop(NORM))
    assert (fault(folder).file, fault(folder).tensor) == (INDEX, NORM)
    change_json(folder, INDEX, lambda index: index["weight_map"].pop(NORM))
    found = fault(folder)
    assert found.tensor == NORM and "config.json asks for it" in str(found)


def test_tensor_that_is_no_part_of_the_model(folder):
    change_tensors(folder, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    assert (fault(folder).file, fault(folder).tensor) == (INDEX, "extra.weight")
    change_json(folder, INDEX, lambda index: index["weight_map"].update({"extra.weight": LAYER}))
    assert (fault(folder).file, fault(folder).tensor) == (LAYER, "extra.weight")


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "..\\model.safetensors", "sub/x.safetensors", 5, "no.safetensors"]
)
def test_index_names_another_file(folder, file):
    change_json(folder, INDEX, lambda index: index["weight_map"].update({NORM: file}))
    found = fault(folder)
    assert (found.file, found.tensor) == (INDEX, NORM)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"weight_map": 5, "metadata": {}}'])
def test_index_not_usable(folder, content):
    (folder / INDEX).unlink()
    if content is not None:
        (folder / INDEX).write_text(content)
    seal(folder)
    assert fault(folder).file == INDEX


def test_total_size(folder):
    change_json(folder, INDEX, lambda index: index["metadata"].update(total_size=5))
    assert fault(folder).file == INDEX


@pytest.mark.parametrize(
    "field, value",
    [
        ("kv_lora_rank", 9),
        ("qk_rope_head_dim", 4),
        ("num_hidden_layers", 2),
        ("num_hidden_layers", 4),
        ("hidden_size", 54),
        ("mla_kv_bias", True),
        ("vocab_size", 300),
    ],
)
def test_config_and_tensors_differ(folder, field, value):
    change_json(folder, "config.json", lambda config: config.update({field: value}))
    assert fault(folder).tensor


@pytest.mark.parametrize(
    "change",
    [
        {"kv_lora_rank": -1},
        {"kv_lora_rank": "wide"},
        {"num_hidden_layers": 0},
        {"model_type": "llama"},
        {"model_type": "mla_bloom"},
        {"model_type": None},
        {"qk_rope_head_dim": None},
    ],
)
def test_config_describes_no_converted_model(folder, change):
    change_json(folder, "config.json", lambda config: config.update(change))
    assert fault(folder).file == "config.json"


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_config_not_readable(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    seal(folder)
    assert fault(folder).file == "config.json"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "{}",
        '{"checksums": {}}',
        '{"checksums": []}',
        '{"checksums": {"../x.safetensors": ""}}',
        '{"checksums": {"model-00001-of-00005.safetensors": 5}}',
    ],
)
def test_report_not_usable(folder, content):
    (folder / "report.json").unlink()
    if content is not None:
        (folder / "report.json").write_text(content)
    seal(folder)
    assert fault(folder).file == "report.json"


def test_command(cli, folder, tmp_path):
    code, out, err = cli("verify", folder)
    assert code == 0 and "5 shards" in out and not err
    code, out, err = cli("verify", folder, "--json")
    assert code == 0 and not err
    found = json.loads(out)
    assert (
        found["ok"]
        and found["shards"] == 5
        and found["tensors"] == len(json.loads((folder / INDEX).read_text())["weight_map"])
    )

    change_tensors(folder, lambda tensors: tensors[NORM].fill_(torch.nan))
    code, out, err = cli("verify", folder)
    assert code == INPUT and not out
    (line,) = err.splitlines()
    assert line.startswith("mla-convert: ") and LAYER in line and NORM in line
    code, out, err = cli("verify", folder, "--json")
    assert code == INPUT and err.splitlines() == [line]
    found = json.loads(out)
    assert (found["ok"], found["file"], found["tensor"]) == (False, LAYER, NORM)

    for path in (tmp_path / "nowhere", folder / LAYER):
        code, out, err = cli("verify", path)
        assert code == INPUT and not out and "not a folder" in err


# ---- every byte of every file


def flip(path, draw):
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_any_bit_of_any_file(folder):
    draw, kept = random.Random(0), {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"README.md", "report.html", "recipe.yaml", "modeling_mla.py", "tokenizer.json", SUMS} <= kept.keys()
    for name, content in sorted(kept.items()):
        for _ in range(40 if name == SUMS else 6):
            flip(folder / name, draw)
            found = fault(folder)
            assert found.file == name or name == SUMS
            (folder / name).write_bytes(content)
    assert verify(folder).files == len(kept) - 1


@pytest.mark.slow
def test_any_bit_of_any_file_often(folder):
    draw = random.Random(1)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(200):
            flip(path, draw)
            fault(folder)
            path.write_bytes(content)


def test_file_gone(folder):
    for name in [*listed(folder), SUMS]:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        found = fault(folder)
        assert found.file == name and "missing" in str(found)
        (folder / name).write_bytes(content)
    verify(folder)


@pytest.mark.parametrize("name", ["evil.py", ".hidden", "tokenizer.py", "more/config.json", "__pycache__/x.pyc"])
def test_file_more(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    assert fault(folder).file == name.partition("/")[0]


def test_what_the_hub_puts_beside_is_left_alone(folder):
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    verify(folder)


@pytest.mark.parametrize("change", [
    lambda text: text.upper(), lambda text: text + "\n", lambda text: text.replace("\n", "\r\n"), lambda text: text.strip(),
    lambda text: text.replace("  ", " *"), lambda text: "# sums\n" + text, lambda text: "", lambda text: text + text,
    lambda text: "".join(sorted(text.splitlines(True))), lambda text: text.replace("  README", "  ./README"),
])  # fmt: skip
def test_sums_have_one_form(folder, change):
    (folder / SUMS).write_bytes(change((folder / SUMS).read_text()).encode())
    assert fault(folder).file == SUMS


def test_sums_that_lead_nowhere(folder, tmp_path):
    (folder / SUMS).unlink()
    (folder / SUMS).symlink_to(tmp_path / "nowhere")
    assert fault(folder).file == SUMS


def test_file_more_by_an_unprintable_name(folder):
    (folder / "a\nb\x1b[0m\udcff").write_text("x")
    assert "\\n" in str(fault(folder)) and str(fault(folder)).isprintable()


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="there is no sha256sum")
def test_sums_are_what_sha256sum_reads(folder):
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(listed(folder))


def older(folder):
    """As version 0.1.0 wrote it."""
    change_json(folder, "report.json", lambda report: report["versions"].update(mla_convert="0.1.0"))
    (folder / SUMS).unlink()


def test_folder_of_an_earlier_version(folder, cli):
    older(folder)
    assert "refresh" in verify(folder).note
    code, out, err = cli("verify", folder)
    assert code == 0 and not err and "only its shards are under checksum" in out.splitlines()[1]
    (folder / "tokenizer.json").unlink()
    assert fault(folder).file == "tokenizer.json"
    flip(folder / LAYER, random.Random(0))
    assert fault(folder).file == LAYER


@pytest.mark.parametrize("by", ["0.2.0.dev0", "0.2.0", "1.0", "0.1", None, 5, "new"])
def test_only_an_earlier_version_may_have_no_sums(folder, by):
    change_json(folder, "report.json", lambda report: report["versions"].update(mla_convert=by))
    (folder / SUMS).unlink()
    if by == "0.1":
        assert verify(folder).note
    else:
        assert fault(folder).file == SUMS


def test_link_to_the_same_bytes_is_no_fault(folder, tmp_path):
    """As in the Hub's cache."""
    (folder / LAYER).rename(tmp_path / "blob")
    (folder / LAYER).symlink_to(tmp_path / "blob")
    verify(folder)


def test_export(tmp_path, convert_pico):
    from mla_convert.publish.engines.export import export

    source = convert_pico("llama", rank=10, rope_dim=8, rope_selection="engine_table").out
    export(source, tmp_path / "out", "hf-code")
    assert verify(tmp_path / "out").note is None
    draw = random.Random(0)
    for path in sorted((tmp_path / "out").iterdir()):
        content = path.read_bytes()
        flip(path, draw)
        fault(tmp_path / "out")
        path.write_bytes(content)
    verify(tmp_path / "out")
