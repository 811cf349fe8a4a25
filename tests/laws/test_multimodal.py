"""Multimodal checkpoints are converted in place: image prompts through transformers give the original's logits and text."""

import json
import os
import shutil
import subprocess
import sys

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    Gemma4UnifiedConfig,
    InternVLConfig,
    LlavaConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from mla_convert.core.errors import InputError
from mla_convert.core.progress import Progress
from mla_convert.evaluate.quality.evaluation import evaluate_model
from mla_convert.source.source import open_source
from mla_convert.write.verify import verify

IMAGE = 250
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 7}  # fmt: skip
CLIP = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
           "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 7}  # fmt: skip
INTERN = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": [28, 28],
          "patch_size": [7, 7]}  # fmt: skip
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2,
        "out_hidden_size": 48, "num_position_embeddings": 16}  # fmt: skip
QWEN2 = {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7,
         "spatial_merge_size": 2}  # fmt: skip
QWEN2_5 = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2,
           "out_hidden_size": 48, "fullatt_block_indexes": [1], "window_size": 28}  # fmt: skip
QWEN3 = {**QWEN, "depth": 3, "deepstack_visual_indexes": [0, 2]}
TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": 251, "vision_end_token_id": 252, "video_token_id": 253}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
WINDOWS = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA4 = {"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2,
          "position_embedding_size": 16}  # fmt: skip
SOUND = {"model_type": "gemma4_audio", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "subsampling_conv_channels": [8, 4], "output_proj_dims": 32}  # fmt: skip
PATCHES = {"model_type": "gemma4_unified_vision", "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 48,
           "mm_posemb_size": 16, "output_proj_dims": 48}  # fmt: skip


def text_config(variant):
    return pico.config(variant).to_dict()


def axes(**settings):
    """Settings of a language model whose positions have three axes."""
    return {**pico.COMMON, "rope_parameters": SECTIONS, **settings}


# name -> configuration of the whole, and the number of tokens that an image takes
WHOLES = {
    "gemma3": lambda: (Gemma3Config(text_config=text_config("gemma3"), vision_config=SIGLIP, mm_tokens_per_image=4,
                                    image_token_index=IMAGE, image_token_id=IMAGE), 4),
    "gemma4": lambda: (Gemma4Config(text_config={**text_config("gemma4-shared"), "use_bidirectional_attention": "vision"},
                                    vision_config=GEMMA4, audio_config=SOUND, image_token_id=IMAGE), 4),
    "gemma4_unified": lambda: (Gemma4UnifiedConfig(text_config=text_config("gemma4-unified"), vision_config=PATCHES,
                                                   audio_config=None, image_token_id=IMAGE), 4),
    "llava": lambda: (LlavaConfig(text_config=text_config("llama"), vision_config=CLIP, image_token_index=IMAGE,
                                  image_token_id=IMAGE, vision_feature_layer=-1), 16),
    "mistral3": lambda: (Mistral3Config(text_config=text_config("mistral"), vision_config=PIXTRAL, image_token_index=IMAGE,
                                        image_token_id=IMAGE, vision_feature_layer=-1), 4),
    "internvl": lambda: (InternVLConfig(text_config=text_config("qwen3"), vision_config=INTERN, image_token_id=IMAGE), 4),
    "qwen2_vl": lambda: (Qwen2VLConfig(text_config=axes(**WINDOWS), vision_config=QWEN2, **TOKENS), 4),
    "qwen2_5_vl": lambda: (Qwen2_5_VLConfig(text_config=axes(), vision_config=QWEN2_5, **TOKENS), 4),
    "qwen3_5": lambda: (Qwen3_5Config(text_config=text_config("qwen3.5"), vision_config=QWEN, **TOKENS), 4),
    "qwen3_vl": lambda: (Qwen3VLConfig(text_config=axes(head_dim=8), vision_config=QWEN3, **TOKENS), 4),
    "qwen3_vl_moe": lambda: (Qwen3VLMoeConfig(text_config=axes(head_dim=8, **EXPERTS), vision_config=QWEN3, **TOKENS), 4),
}  # fmt: skip


def make(name, folder):
    """(name, original in float32, folder of its checkpoint, tokens of an image)."""
    config, tokens = WHOLES[name]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():  # Gemma 4's bounds, which a checkpoint states
            if key.endswith(("put_min", "put_max")):
                buffer.fill_(-9.0 if key.endswith("min") else 9.0)
    model.save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "own.Own"}, "size": 28})
    )
    (folder.parent / "text.txt").write_text(pico.text())
    return name, model, folder, tokens


@pytest.fixture(scope="module", params=sorted(WHOLES))
def whole(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param) / "source")


@pytest.fixture(scope="module")
def exact(whole, tmp_path_factory):
    """The report of a conversion at full rank."""
    return pico.convert(whole[2], tmp_path_factory.mktemp("exact") / "out", rank="full", rope_dim="full")


def prompt(name, tokens):
    """Two prompts with an image each, the second one padded on the left."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (2, 12 + tokens), generator=draw)
    ids[:, 5 : 5 + tokens] = IMAGE
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 28, 28, generator=draw)}
    kinds = (ids == IMAGE).long()
    if name == "gemma3":
        given["token_type_ids"] = kinds
    if name.startswith("gemma4"):
        side = 4 if name == "gemma4" else 2  # before and after 2 x 2 patches are one token
        patches = torch.randn(2, side * side, 3 * 4 * 4, generator=draw)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(2, -1, -1)
        given |= {"pixel_values": patches, "image_position_ids": places, "mm_token_type_ids": kinds}
    if name == "mistral3":
        given["image_sizes"] = torch.tensor([[28, 28]] * 2)
    if name.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]] * 2)
        patches = torch.randn(32, 3 * 2 * 7 * 7, generator=draw)
        given |= {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    return given


def loaded(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_image_prompts_give_the_originals_text(whole, exact):
    name, original, _, tokens = whole
    converted, given = loaded(exact.out), prompt(name, tokens)
    expected, found = original(**given).logits, converted(**given).logits
    seen = given["attention_mask"].bool()
    assert (found - expected).abs()[seen].max() <= 1e-4 * (expected.max() - expected.min())
    words = {key: value for key, value in given.items() if key in ("input_ids", "attention_mask")}
    blind = converted(**words).logits
    assert (blind - original(**words).logits).abs()[seen].max() <= 1e-4 * (expected.max() - expected.min())
    assert (blind - found).abs()[seen].max() > 1e-2 * (expected.max() - expected.min())  # the image matters
    for cache in ({"use_cache": True}, {"use_cache": False}):
        text = [model.generate(**given, max_new_tokens=8, do_sample=False, **cache) for model in (original, converted)]
        assert torch.equal(*text)


# In a process without mla_convert: the folder's own code, as both Auto classes load it, and after it is saved again.
FOREIGN = """
import json, sys
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "mla_convert":
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
torch.set_grad_enabled(False)
source, copy, given = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
for auto, folder in ((AutoModelForImageTextToText, source), (AutoModelForCausalLM, source), (AutoModelForImageTextToText, copy)):
    model, info = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    print(json.dumps(model.eval()(**given).logits[0, -1].tolist()))
    if folder != copy:
        model.save_pretrained(copy)
"""


@torch.no_grad()
@pytest.mark.parametrize(
    "whole",
    [pytest.param(name, marks=() if name == "llava" else pytest.mark.slow) for name in sorted(WHOLES)],
    indirect=True,
    scope="module",
)
def test_loads_without_this_package(whole, tmp_path):
    name, _, source, tokens = whole
    out = pico.convert(source, tmp_path / "out", kv_ratio=0.5, uniform=False).out
    given = prompt(name, tokens)
    torch.save(given, tmp_path / "given.pt")
    run = subprocess.run(
        [sys.executable, "-c", FOREIGN, out, tmp_path / "copy", tmp_path / "given.pt"],
        capture_output=True, text=True, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    expected = loaded(out)(**given).logits[0, -1]
    answers = [torch.tensor(json.loads(line)) for line in run.stdout.splitlines()]
    assert len(answers) == 3
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_quantised_caches_of_the_original_are_measured(whole, tmp_path):
    """Its language model layer by layer, and the whole in memory."""
    name, _, folder, _ = whole
    if name not in ("gemma4", "llava", "qwen3_5"):
        pytest.skip("the same code")
    report = pico.convert(folder, tmp_path / "out", original_cache="int4")
    text = str(folder.parent / "text.txt")
    found = evaluate_model(
        str(tmp_path / "out"), str(folder), text=text, original_cache=["int4"], progress=Progress(quiet=True)
    )
    (one,), (other,) = found.original_cache.formats, report.original_cache.formats
    assert one.share == pytest.approx(other.share) and one.kl.value == pytest.approx(other.kl.value, rel=1e-3)


def test_other_parts_are_untouched(whole, exact):
    _, original, _, _ = whole
    before, after = original.state_dict(), loaded(exact.out).state_dict()
    tied = original.all_tied_weights_keys
    kept = {name for name in before if ".self_attn." not in name or "language_model" not in name}
    assert any("vision" in name or "visual" in name for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept - set(tied))
    processor = json.loads((exact.out / "preprocessor_config.json").read_text())
    assert processor == {"size": 28}  # settings, without the name of code


# The way is the same for all, and takes ten seconds each.
@pytest.mark.parametrize(
    "whole",
    [pytest.param(name, marks=() if name == "gemma4" else pytest.mark.slow) for name in sorted(WHOLES)],
    indirect=True,
    scope="module",
)
def test_from_report_to_the_hub(whole, hub, cli, tmp_path):
    name, _, source, tokens = whole
    report = pico.convert(source, tmp_path / "tiny", kv_ratio=0.25, uniform=False, calib_noise=0)
    folder = report.out
    assert report.cache["share_saved"] == pytest.approx(0.75, abs=0.05) and any(
        "multimodal" in note for note in report.notes
    )
    given = prompt(name, tokens)
    assert (
        loaded(folder).generate(**given, max_new_tokens=3, do_sample=False).shape[1] == given["input_ids"].shape[1] + 3
    )
    code, out, err = cli("inspect", folder, "--json")
    assert code == 0 and json.loads(out)["model_type"] == f"mla_{name}", err
    text = source.parent / "text.txt"
    code, out, err = cli("heal", folder, "--teacher", source, "--data", text, "--tokens", "12288", "--length", "64",
                         "--step-tokens", "512", "--micro-tokens", "256", "--evaluations", "4", "--lr", "0.003", "--noise", "0",
                         "--device", "cpu", "--self-share", "0", "--eval-windows", "2", "--eval-length", "48",
                         "--eval", "package:mla_demo/calibration.txt.gz", "--train", "attention")  # fmt: skip
    assert code == 0, err
    assert verify(folder).tensors > 0
    code, out, err = cli("verify", folder, "--run")
    assert code == 0, err
    code, out, err = cli("refresh", folder)
    assert code == 0 and "nothing to do" in out, err
    code, out, err = cli("eval", folder, "--against", source, "--eval", text, "--eval-windows", "2", "--json")
    assert code == 0 and json.loads(out)["cache"]["share_saved"] == pytest.approx(report.cache["share_saved"]), err
    code, out, err = cli("push", folder, "me/tiny-whole")
    assert code == 0 and "pipeline_tag: image-text-to-text" in hub.files("me/tiny-whole")["README.md"].decode(), err


def read(folder):
    """Tensors and configuration of a checkpoint in one file."""
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def write(folder, tensors, config):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_forms_of_published_checkpoints(name, tmp_path):
    _, original, folder, tokens = make(name, tmp_path / "source")
    tensors, config = read(folder)
    if name == "qwen3_vl_moe":
        stored = {key: tensor for key, tensor in tensors.items() if ".experts." in key}
        tensors |= {key: tensor.mT.contiguous() for key, tensor in stored.items()}
    else:  # the language model's settings stand beside those of the whole
        text = config.pop("text_config")
        text.pop("model_type")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config = {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    write(folder, tensors, config)
    given = prompt(name, tokens)
    expected = original(**given).logits
    assert torch.equal(loaded(folder)(**given).logits, expected)  # the form is one that transformers reads
    report = pico.convert(folder, tmp_path / "out", rank="full", rope_dim="full")
    found = loaded(report.out)(**given).logits
    assert (found - expected).abs()[given["attention_mask"].bool()].max() <= 1e-4 * (expected.max() - expected.min())


def test_a_missing_part_is_refused(whole, tmp_path):
    _, _, source, _ = whole
    folder = shutil.copytree(source, tmp_path / "source")
    tensors, config = read(folder)
    gone = next(name for name in tensors if "vision" in name or "visual" in name)
    tensors.pop(gone)
    write(folder, tensors, config)
    with pytest.raises(InputError, match=r"^tensor .* is missing, or stored in a form"):
        open_source(str(folder))


def test_a_language_model_without_a_type_is_refused(tmp_path):
    _, _, folder, _ = make("llava", tmp_path / "source")
    tensors, config = read(folder)
    del config["text_config"]["model_type"]
    write(folder, tensors, config)
    with pytest.raises(InputError, match=r"^llava is multimodal, and its language model is not supported"):
        open_source(str(folder))
