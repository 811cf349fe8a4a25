"""Time and memory of a conversion at real shapes, on random weights.

    python benchmarks/conversion_cost.py --shape llama-1b --layers 16 32 --refine-steps 0 --calib-samples 8 --calib-length 512
    python benchmarks/conversion_cost.py --shape llama-8b --rank 512 --rope-dim 64 --calib-samples 128 --refine-steps 150
    python benchmarks/conversion_cost.py --shape llama-70b --layers 8 --rank 512 --rope-dim 64 --calib TEXT --gpus 2

Writes a checkpoint of the shape shard by shard, converts it, and prints seconds and peak memory of each phase. Each conversion
is a process of its own, so that peaks do not mix. Host memory is above that of the interpreter with its libraries.
The checkpoints are random: perplexities have no meaning. The packaged text fills 68 windows; give a longer one for more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {
    "llama-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
    "llama-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                      num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
}  # fmt: skip
COMMON = dict(vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0)


def make_checkpoint(folder: Path, shape: dict) -> None:
    """A random bfloat16 Llama checkpoint, one shard a layer, with the demo's tokenizer."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    import mla_demo

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**COMMON, **shape, dtype=torch.bfloat16)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "ends", {})[name] = parameter
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for key, parameters in shards.items():
        file = f"model-{key}.safetensors"
        tensors = {}
        for name, parameter in parameters.items():
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            tensors[name] = (
                # Weights as models are initialised, so that hidden states stay finite through all layers.
                values.fill_(1.0) if "norm" in name else values.normal_(0, 0.02, generator=generator)
            ).cpu()
            weight_map[name] = file
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    # A tokenizer may have fewer tokens than the embedding has rows.
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(mla_demo.__file__).parent / "model" / file, folder / file)


def convert(source: Path, out: Path, options: list[str]) -> dict:
    """Convert in a process of its own; returns the content of the report."""
    texts = {"--calib": "package:mla_demo/calibration.txt.gz", "--eval": "package:mla_demo/evaluation.txt.gz"}
    given = [each for option, text in texts.items() if option not in options for each in (option, text)]
    command = [sys.executable, "-m", "mla_convert", str(source), "--out", str(out), "--json", *given, *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Parse the options, make the checkpoints, convert them, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, nargs="*", help="layer counts to try (default: the shape's own)")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("--make-only", action="store_true", help="only write the source checkpoints")
    known, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=known.work) as temporary:
        for layers in known.layers or [SHAPES[known.shape]["num_hidden_layers"]]:
            folder = (known.work or Path(temporary)) / f"{known.shape}-{layers}"
            if not (folder / "config.json").exists():
                make_checkpoint(folder, {**SHAPES[known.shape], "num_hidden_layers": layers})
            if known.make_only:
                continue
            report = convert(folder, Path(temporary) / "out", options)
            print(f"{known.shape}, {layers} layers, {report['device']}, {report['seconds']:.0f} s in all")
            print(f"{'phase':10} {'seconds':>8} {'host GB':>8} {'device GB':>10}")
            for phase, figures in report["phases"].items():
                device = figures.get("peak_device_bytes", 0) / 1e9
                print(f"{phase:10} {figures['seconds']:8.1f} {figures['peak_host_bytes'] / 1e9:8.2f} {device:10.2f}")
            steps = {
                key: sum(layer["seconds"][key] for layer in report["layers"]) for key in report["layers"][0]["seconds"]
            }
            print("  in layers: " + ", ".join(f"{key} {value:.1f} s" for key, value in steps.items()), flush=True)
            shutil.rmtree(Path(temporary) / "out")


if __name__ == "__main__":
    main()
