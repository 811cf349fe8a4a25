"""What tests of refused conversions share: exit codes, the one line, listings of folders, and damage to checkpoints."""

import json

from safetensors.torch import load_file, save_file

USAGE, INPUT, RESOURCE, INTERRUPTED = 2, 4, 5, 130
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def assert_one_line(code, out, err, expected, culprit):
    assert code == expected, err
    (line,) = err.splitlines()
    assert line.startswith("mla-convert: ") and culprit in line
    assert not out


def listing(folder):
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in sorted(folder.rglob("*"))}


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def change_weights(folder, name, change):
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name]) if change else None
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / WEIGHTS, {"format": "pt"})


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])
