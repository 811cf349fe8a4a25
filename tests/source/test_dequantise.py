"""Quantised checkpoints: their values equal transformers', and their conversion is exact."""

import json

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from mla_convert.source.checkpoint.reader import SafetensorsReader
from mla_convert.source.source import open_source

BLOCK = (16, 32)  # does not divide all rows and columns of a pico model
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def blocks_of(weight, block):
    """Scales of each block of a weight, and the same scales expanded to the weight's shape."""
    scale = torch.empty(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale[i, j] = part.abs().max() / 448
    spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return scale, spread[: weight.shape[0], : weight.shape[1]]


def scales(weight, kind):
    if kind == "block":
        return blocks_of(weight, BLOCK)
    scale = (weight.abs().amax(1, keepdim=True) if kind == "row" else weight.abs().max()) / 448
    return scale, scale


QUANTIZATION = {
    "block": {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
    "row": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    "tensor": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
}


def quantise(folder, kind, name="qwen2"):
    """A checkpoint whose projections are FP8; returns the dequantised weights in bfloat16."""
    pico.save(name, folder, dtype=torch.bfloat16)
    tensors, meant = {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        meant[key] = tensors[key] = tensor
        if "_proj.weight" in key:
            scale, spread = scales(tensor.float(), kind)
            tensors[key] = (tensor.float() / spread).to(torch.float8_e4m3fn)
            tensors[key + ("_scale_inv" if kind == "block" else "_scale")] = scale
            meant[key] = (tensors[key].float() * spread).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, QUANTIZATION[kind])
    return meant


def configure(folder, quantization):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": quantization}))


@pytest.mark.parametrize("kind", QUANTIZATION)
def test_fp8_is_read_as_what_it_means(tmp_path, kind):
    meant = quantise(tmp_path / "source", kind)
    source = open_source(str(tmp_path / "source"))
    assert set(source.reader.names()) == set(meant) and source.dtype == torch.bfloat16
    assert not hasattr(source.config, "quantization_config")
    for key, tensor in source.reader.read(meant).items():
        assert source.reader.shape(key) == tuple(tensor.shape) and source.reader.dtype(key) == tensor.dtype
        assert torch.equal(tensor, meant[key]), key
        assert torch.equal(source.reader.rows(key, 1, 3), meant[key][1:3])


def test_fp8_is_read_as_transformers_reads_it(tmp_path, monkeypatch):
    # blocks that divide every weight: transformers assumes blocks of equal size
    monkeypatch.setitem(globals(), "BLOCK", (16, 16))
    monkeypatch.setitem(QUANTIZATION["block"], "weight_block_size", [16, 16])
    quantise(tmp_path / "source", "block")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=BLOCK)
    ).state_dict()
    reader = open_source(str(tmp_path / "source")).reader
    found = reader.read(name for name in reader.names() if "_proj.weight" in name)
    assert found
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, theirs[key].to(tensor.dtype), rtol=2**-7, atol=0)


def test_conversion_of_an_fp8_checkpoint_is_exact(tmp_path, convert_folder):
    meant = quantise(tmp_path / "source", "block")
    original = pico.model("qwen2").float()
    original.load_state_dict({key: tensor.float() for key, tensor in meant.items()}, strict=False)
    report = convert_folder(tmp_path / "source", rank="full", rope_dim="full", dtype="float32")
    converted = AutoModelForCausalLM.from_pretrained(report.out)
    assert getattr(converted.config, "quantization_config", None) is None
    ids = torch.randint(3, pico.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = original(ids).logits, converted(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_blocks_that_do_not_fit_are_refused(tmp_path, cli):
    quantise(tmp_path / "source", "block")
    configure(tmp_path / "source", {**QUANTIZATION["block"], "weight_block_size": [8, 8]})
    code, out, err = cli(
        tmp_path / "source", "--out", tmp_path / "out", "--calib", tmp_path / "text.txt", "--device", "cpu"
    )
    assert code == 4 and "blocks of [8, 8]" in err and not out and not (tmp_path / "out").exists()


def test_mxfp4_experts(tmp_path):
    """Random codes and exponents, compared with the format's table of values."""
    experts, rows, groups = 3, 8, 2
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (experts, rows, groups, 32), generator=generator)
    exponents = torch.randint(120, 132, (experts, rows, groups), generator=generator)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    save_file({"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": exponents.to(torch.uint8),
               "mlp.experts.down_proj_bias": torch.zeros(experts, rows)}, tmp_path / "model.safetensors")  # fmt: skip
    from mla_convert.source.checkpoint.dequantise import DequantisedReader

    reader = DequantisedReader(SafetensorsReader(tmp_path), {"quant_method": "mxfp4"})
    assert set(reader.names()) == {"mlp.experts.down_proj", "mlp.experts.down_proj_bias"}
    expected = (FP4[codes] * torch.exp2(exponents - 127.0)[..., None]).flatten(2).mT
    found = reader.read(["mlp.experts.down_proj"])["mlp.experts.down_proj"]
    assert tuple(found.shape) == reader.shape("mlp.experts.down_proj") == (experts, groups * 32, rows)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)


def packed(weight):
    """Weights (E, c, n) as MXFP4 blocks and scales, and the dequantised weights (E, c, n) in bfloat16."""
    groups = weight.mT.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes = (groups / exponents.exp2() - FP4[:, None, None, None, None]).abs().argmin(0)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    meant = (FP4[codes] * exponents.exp2()).flatten(2).mT.bfloat16()
    return blocks, (exponents[..., 0] + 127).to(torch.uint8), meant


def test_conversion_of_an_mxfp4_checkpoint_is_exact(tmp_path, monkeypatch, convert_folder):
    for size in ("hidden_size", "intermediate_size"):
        monkeypatch.setitem(pico.COMMON, size, 64)
    folder = pico.save("gpt-oss", tmp_path / "source", dtype=torch.bfloat16)
    original, tensors = pico.model("gpt-oss").float(), {}
    state = original.state_dict()
    for key, tensor in load_file(folder / "model.safetensors").items():
        state[key] = tensor.float()
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[key + "_blocks"], tensors[key + "_scales"], meant = packed(tensor.float())
            state[key] = meant.float()
        else:
            tensors[key] = tensor
    assert any(key.endswith("_blocks") for key in tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    original.load_state_dict(state)
    original.set_attn_implementation("eager")
    report = convert_folder(folder, rank="full", rope_dim="full", dtype="float32")
    converted = AutoModelForCausalLM.from_pretrained(report.out)
    ids = torch.randint(3, pico.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = original(ids).logits, converted(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_methods_are_refused_by_name(tmp_path, cli, method):
    pico.save("llama", tmp_path / "source")
    configure(tmp_path / "source", {"quant_method": method})
    code, out, err = cli(tmp_path / "source", "--out", tmp_path / "out")
    assert code == 4 and f"quantised ({method})" in err and "FP8" in err and not out
