"""Export of a converted model in DeepSeek-V3's form, one layer at a time, for engines without support for mla_convert."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.files import on_disk, write_file
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import mean
from mla_convert.core.runtime import versions
from mla_convert.method.factorise.sizes import TABLE
from mla_convert.modeling.shipped_code import write_code
from mla_convert.publish.engines.converted_checkpoint import EMBEDDING, HEAD, NORM, Converted
from mla_convert.publish.engines.deepseek_config import CODE_CLASS, CODE_FILE, MODEL_CLASS, ServedForm, served_config
from mla_convert.publish.engines.latent_attention import DISTORTION, LatentNorm, LayerForm, served_attention
from mla_convert.publish.engines.padding import Pad, Sizes, padded
from mla_convert.publish.engines.profiles import Profile, check_dtype, residual_scale
from mla_convert.publish.engines.qk_norm import block_diagonal
from mla_convert.publish.engines.readme import write_readme
from mla_convert.publish.engines.rope_table import share_table
from mla_convert.source.carried import carried_files, carry
from mla_convert.source.checkpoint.reader import check_finite
from mla_convert.source.shape import kv_heads
from mla_convert.write.intact import EXPORT, check_input
from mla_convert.write.selfcheck import self_check
from mla_convert.write.writer import Writer, check_output, check_space

# Scale of the latent. portable: small, because its eps is; engine: near one, because quantised rows need that.
PORTABLE_ALPHA, LEAST_ALPHA = 2.0**-30, 2.0**-60
# Epsilon of hf-code's own norm, a power of four, so that its root is a power of two and latents stay unchanged.
CODE_EPS, LARGEST_CODE_EPS = 4.0**20, 4.0**60


@dataclass(frozen=True)
class Export:
    """The export that was written. `distortion` bounds the relative error of a latent by its norm, for any input."""

    out: Path
    profile: Profile
    sizes: Sizes
    dtype: str
    distortion: float
    source_numbers: float

    def as_dict(self) -> dict[str, Any]:
        """For `export --json` and export.json, without the local path."""
        sizes = {"kv_lora_rank": self.sizes.rank, "qk_rope_head_dim": self.sizes.rope_dim,
                 "qk_nope_head_dim": self.sizes.nope_dim, "v_head_dim": self.sizes.v_dim}  # fmt: skip
        return {"profile": self.profile, "dtype": self.dtype, **sizes, "cache_numbers": self.sizes.cache_width,
                "converted_cache_numbers": self.source_numbers, "latent_norm_distortion": self.distortion}  # fmt: skip


@dataclass(frozen=True)
class _Form:
    """Parameters of the map from converted to exported tensors."""

    sizes: Sizes
    slots: list[list[int]]
    norms: list[LatentNorm]
    distortion: float
    q_scale: float
    rope_scale: float
    residual: float
    dtype: torch.dtype

    def layer(self, index: int) -> LayerForm:
        """The form of one layer's attention."""
        return LayerForm(self.sizes, self.slots[index], self.norms[index], self.q_scale, self.rope_scale, self.residual)


def export(
    folder: Path,
    out: Path,
    profile: Profile = "portable",
    dtype: str = "auto",
    pad: Pad = "auto",
    gguf: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Write the converted model in `folder` to `out` as a dense DeepSeek-V3 checkpoint.

    Args:
        folder: a converted or healed folder.
        out: the folder to write.
        profile: the engines that it is for (docs/guides/serve.md).
        dtype: "float32", "bfloat16", or "auto" for the folder's own.
        pad: see `padded`.
        gguf: make config.json for llama.cpp's converter (profile engine only).
        overwrite: replace `out` even if it is no output of mla_convert.
        progress: for notes and a bar.

    Raises:
        UsageError: gguf in another profile.
        InputError: the folder is damaged, or the profile cannot express this model or size; nothing is written.
        ResourceError: the disk does not suffice.
        SelfCheckFailed: the export generates something else than expected (only profiles that transformers loads).
    """
    if gguf and profile != "engine":
        raise UsageError("--gguf is for --profile engine: quantised, the other profiles' latents would be lost")
    model, progress = Converted(folder, profile), progress or Progress()
    note = check_input(folder)
    dtype = check_dtype(str(model.reader.dtype(EMBEDDING)).removeprefix("torch."), dtype)
    check_output(out, folder, overwrite)
    if note:
        progress.note(note)
    form, content = _plan(model, profile, dtype, pad, gguf)
    check_space(out, _bytes(content, form))
    held = mean(model.config.layer_rank(index) + model.config.layer_rope_dim(index) for index in model.layers)
    result = Export(out, profile, form.sizes, dtype, form.distortion, held)

    sources = [(file.name, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    with Writer(out.resolve(), {"export": content, "source": sources}) as writer:
        progress.start(len(model.layers), 0, "exporting")
        try:
            for number, tensors in enumerate(_shards(model, form)):
                file = f"model-{number + 1:05d}-of-{len(model.layers) + 2:05d}.safetensors"
                check_finite(tensors, most=math.inf)  # a latent norm's weight may be large, as its epsilon is
                writer.write_shard(file, tensors)
                # The first shard and the last one are no layers.
                if 0 < number <= len(model.layers):
                    progress.layer_measured()
        finally:
            progress.stop()
        _write_rest(model, writer, content, result)
    return result


def _plan(model: Converted, profile: Profile, dtype: str, pad: Pad, gguf: bool) -> tuple[_Form, dict[str, Any]]:
    """The form of the exported tensors, and the content of config.json."""
    config, traits, planes = model.config, model.traits, model.planes()
    ranks = [config.layer_rank(index) for index in model.layers]
    widest = max(config.layer_nope_dim(index) for index in model.layers)
    if profile == "hf-code":
        # The code has a table for each layer, so that planes stay where they are.
        slots, theta, rope_dim = [list(range(len(layer))) for layer in planes], traits.theta, 2 * max(map(len, planes))
    else:
        table = share_table(planes, list(traits.inv_freq), traits.theta, None if pad == "none" else TABLE)
        slots, theta, rope_dim = table.slots, table.theta, 2 * table.size
    sizes = padded(ranks, rope_dim, widest, config.v_head_dim, pad)
    largest = model.largest_writing_weight() if profile == "engine" else 0.0
    residual, eps = residual_scale(profile, config.rms_norm_eps, largest)
    bounds = [model.largest_latent(index, sizes.rank) for index in model.layers]
    norms = _latent_norms(profile, bounds, eps)
    distortion = max(norm.distortion(bound) for norm, bound in zip(norms, bounds, strict=True))
    content = served_config(config, ServedForm(profile, sizes, dtype, theta, eps, gguf))
    # Engines divide by the square root of a head's padded width; the queries make up for it.
    q_scale = traits.softmax_scale * math.sqrt(sizes.nope_dim + sizes.rope_dim)
    if profile == "hf-code":
        q_scale = 1.0
        content |= _code_fields(model, planes, sizes, norms[0].eps)
    form = _Form(sizes, slots, norms, distortion, q_scale, traits.rope_scale, residual, getattr(torch, dtype))
    return form, content


def _code_fields(model: Converted, planes: list[list[int]], sizes: Sizes, latent_eps: float) -> dict[str, Any]:
    """Fields of config.json for the code of profile hf-code. RoPE tables are padded with frequencies of zero."""
    config, m = model.config, sizes.rope_dim // 2
    tables = [[model.traits.inv_freq[f] for f in layer] + [0.0] * (m - len(layer)) for layer in planes]
    module, normed = CODE_FILE.removesuffix(".py"), config.mla_q_norm is not None
    return {
        "auto_map": {"AutoModel": f"{module}.{MODEL_CLASS}", "AutoModelForCausalLM": f"{module}.{CODE_CLASS}"},
        "mla_q_bias": config.mla_q_bias and not normed,
        "mla_kv_bias": config.mla_kv_bias and not normed,
        "mla_o_bias": config.mla_o_bias,
        "mla_softmax_scale": model.traits.softmax_scale,
        "mla_latent_eps": latent_eps,
        "mla_inv_freq": tables[:1] if all(table == tables[0] for table in tables) else tables,
        "mla_pad_token_id": config.pad_token_id,
        "mla_head_dim": config.v_head_dim,
        "mla_feature_heads": [config.num_attention_heads, *[kv_heads(config)] * 2] if normed else None,
        "mla_feature_bias": normed and (config.mla_q_bias or config.mla_kv_bias),
    }


def _latent_norms(profile: Profile, bounds: list[float], eps: float) -> list[LatentNorm]:
    """For each layer, a norm that leaves the latent unchanged to `DISTORTION`.

    Args:
        profile: of the export.
        bounds: upper bound of each layer's mean squared latent.
        eps: the engine's epsilon, in the profiles without code.

    Raises:
        InputError: latents can be so large that no norm does.
    """
    if profile == "hf-code":
        code_eps = CODE_EPS
        # One epsilon serves all layers, because config.json has one.
        while max(bounds) / (2 * code_eps) > DISTORTION and code_eps < LARGEST_CODE_EPS:
            code_eps *= 4
        candidates = [LatentNorm.linear(code_eps, bound, 1.0, 1.0) for bound in bounds]
    else:
        largest = 1.0 if profile == "engine" else PORTABLE_ALPHA
        candidates = [LatentNorm.linear(eps, bound, largest, LEAST_ALPHA) for bound in bounds]
    norms = []
    for layer, (norm, bound) in enumerate(zip(candidates, bounds, strict=True)):
        if norm is None:
            raise InputError(
                f"the latent of layer {layer} can reach a root mean square of {math.sqrt(bound):.1e}, which an engine's latent "
                f"norm would change by more than {DISTORTION}: this model cannot be exported"
            )
        norms.append(norm)
    return norms


def _bytes(content: dict[str, Any], form: _Form) -> int:
    """Bytes of all exported tensors."""
    hidden, heads, sizes = content["hidden_size"], content["num_attention_heads"], form.sizes
    per_head = 2 * sizes.nope_dim + sizes.rope_dim + 2 * sizes.v_dim
    layer = 3 * hidden * content["intermediate_size"] + hidden * sizes.cache_width
    layer += heads * (hidden * (sizes.nope_dim + sizes.rope_dim + sizes.v_dim) + sizes.rank * per_head)
    total = content["num_hidden_layers"] * layer + 2 * content["vocab_size"] * hidden
    return total * form.dtype.itemsize


def _shards(model: Converted, form: _Form) -> Iterator[dict[str, Tensor]]:
    """Exported tensors: embeddings, then each layer's, then the final norm and the head, which is never tied."""
    table = model.reader.read([EMBEDDING])[EMBEDDING]
    yield {EMBEDDING: _scaled(table, form.residual).to(form.dtype)}
    del table
    for index in model.layers:
        attention, features, rest = model.layer(index)
        served = served_attention(attention, form.layer(index))
        # All that is added to the residual stream has the same factor, which the next norm takes out again.
        rest["mlp.down_proj.weight"] = _scaled(rest["mlp.down_proj.weight"], form.residual)
        if features:
            served["q_proj.weight"] = block_diagonal(served["q_proj.weight"], model.config.num_attention_heads)
            rest |= features.tensors()
        named = rest | {f"self_attn.{name}": tensor for name, tensor in served.items()}
        yield {f"model.layers.{index}.{name}": tensor.to(form.dtype) for name, tensor in named.items()}
    last = model.reader.read([NORM, EMBEDDING if model.config.tie_word_embeddings else HEAD])
    head = last.pop(EMBEDDING) if model.config.tie_word_embeddings else last.pop(HEAD)
    yield {NORM: last[NORM].to(form.dtype), HEAD: head.to(form.dtype)}


def _scaled(weight: Tensor, factor: float) -> Tensor:
    """A weight times a factor, in float32: float64 would take too much memory for large tables."""
    return weight if factor == 1 else weight.float() * factor


def _write_rest(model: Converted, writer: Writer, content: dict[str, Any], result: Export) -> None:
    """Write configuration, code, tokenizer, export.json and README beside the weights, then publish the folder."""
    folder = writer.folder
    with on_disk("the export", writer.out.parent):
        write_file(folder / "config.json", json.dumps(content, indent=2) + "\n")
        if result.profile == "hf-code":
            write_code(folder, exported=True)
        for file in carried_files(model.folder):
            carry(file, folder)
        facts = {"source": model.label, **result.as_dict(), "versions": versions(), "checksums": writer.checksums()}
        writer.write_index()
        if result.profile != "engine":  # transformers would misread it
            facts["self_check"] = self_check(folder)
        write_file(folder / EXPORT, json.dumps(facts, indent=2) + "\n")
        write_readme(folder, model.label, facts)
        writer.publish()
