"""A converted model with a quantised cache: its bytes, and the same text with a cache of any kind as without one."""

import json

import pytest
import torch
from transformers import DynamicCache, StaticCache
from uses import FEATURES, IDS, K, cached_error, load

from mla_convert.modeling.caching import with_cache
from mla_convert.modeling.latent_format_mla import layer_format

KINDS = ["fp8", "int8", "int4", "auto", "auto, rope in int4"]


@pytest.fixture(params=KINDS)
def folder(request, convert_pico):
    kind, _, four_bits = request.param.partition(", ")
    rope = {"cache_rope": "int4" if four_bits else "int8"} if four_bits or kind == "int8" else {}
    return convert_pico("llama", rank=16, rope_dim=8, cache_dtype=kind, **rope).out


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_hold_packed_rows_alone(folder, kind):
    model = load(folder)
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=32)
    model(IDS, **with_cache(model, cache))
    stated = [layer_format(model.config, index).row_bytes for index in range(model.config.num_hidden_layers)]
    for layer, row in zip(cache.layers, stated, strict=True):
        assert layer.keys.dtype == torch.uint8 and layer.keys.shape == (2, 1, 17 if kind == "dynamic" else 32, row)
        assert (
            layer.keys.numel() + layer.values.numel() * layer.values.itemsize == layer.keys.untyped_storage().nbytes()
        )
    report = json.loads((folder / "report.json").read_text())["cache"]
    assert report["bytes_per_token"]["after"] == sum(stated)
    assert report["share_saved"] == 1 - sum(stated) / report["bytes_per_token"]["before"]
    assert report["latent_cache"] == model.config.latent_cache


def test_cached_and_uncached_decoding_agree(folder):
    assert cached_error(load(folder)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("feature", ["beams", "prompt lookup", "chunked prefill", "embeddings"])
def test_generation_in_all_ways(folder, feature):
    model = load(folder)
    found = FEATURES[feature](model, None)
    model.generate = lambda *args, _of=model.generate, **options: _of(
        *args, **{key: value for key, value in options.items() if key[:4] not in ("prom", "pref")}, use_cache=False
    )
    assert torch.equal(found, FEATURES["beams" if feature == "beams" else feature](model, None))


@torch.no_grad()
def test_assisted_generation(folder, sources):
    model = load(folder)
    assert torch.equal(
        FEATURES["assisted"](model, load(sources("llama"))), model.generate(IDS[:1], use_cache=False, **K)
    )


@torch.no_grad()
def test_a_cropped_and_a_reused_cache(folder):
    model = load(folder)
    assert torch.equal(FEATURES["cropped"](model, None), model(IDS[:1, :10], use_cache=False).logits[:, 6:].argmax(-1))
    first = model.generate(IDS[:1], use_cache=False, **K)
    expected = model.generate(torch.cat([first, IDS[1:, :5]], dim=1), use_cache=False, **K)
    assert torch.equal(FEATURES["reused"](model, None), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padding_on_the_left_changes_nothing(folder, kind):
    model = load(folder)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:1]], dim=1)
    mask = (torch.arange(21) >= 4).long()[None]
    cache = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
    found = model.generate(padded, attention_mask=mask, **cache, **K)
    assert torch.equal(found[:, 4:], model.generate(IDS[:1], use_cache=False, **K))


@torch.no_grad()
def test_compiled_by_torch(folder):
    model = load(folder)
    expected = model(IDS, use_cache=False).logits
    found = torch.compile(model, backend="aot_eager")(IDS, use_cache=False).logits
    # Fused operations round otherwise, and a code may be its neighbour then.
    assert (found - expected).square().mean() < 1e-3 * expected.var()


def test_gradients_pass_through_the_rounding(folder):
    model = load(folder).train()
    model(IDS, labels=IDS).loss.backward()
    for name in ("kv_a_proj_with_mqa", "kv_b_proj", "q_proj"):
        gradient = getattr(model.model.layers[0].self_attn, name).weight.grad
        reached = gradient.abs().sum(1).gt(0)
        # Content dims of a query that stayed rotary are zero, and so are their gradients but for rounding.
        assert gradient.isfinite().all() and (reached.any() if name == "q_proj" else reached.all())


def test_what_is_measured_is_what_is_served(convert_pico):
    """Refinement lowers the error of the quantised model, and the report's perplexity is that of the written folder."""
    from mla_convert.evaluate.quality.evaluation import evaluate_model

    settings = {"calib_samples": 32, "refine_steps": 30, "refine_batch": 4, "calib_noise": 0}
    report = convert_pico("llama", rank=16, rope_dim=8, cache_dtype="int4", **settings)
    refined = [(layer.residual_error_closed_form, layer.residual_error) for layer in report.layers]
    assert all(after <= before for before, after in refined) and any(after < before for before, after in refined)
    found = evaluate_model(str(report.out), text=str(report.out.parent.parent / "llama" / "text.txt"), device="cpu",
                           windows=4, length=48, suite_windows=0)  # fmt: skip
    assert found.after.value == pytest.approx(report.evaluation.after.value, rel=1e-4)
    assert found.bytes_after == report.cache.bytes_per_token.after


@torch.no_grad()
def test_other_caches_are_refused(folder, convert_pico):
    model, other = load(folder), load(convert_pico("llama", rank=22, rope_dim=10).out)
    cache = DynamicCache(config=model.config)
    other(IDS, **with_cache(other, cache))
    with pytest.raises(ValueError, match="filled by another model"):
        model(IDS, **with_cache(model, cache))
    pytest.importorskip("hqq")
    config = {"backend": "hqq", "nbits": 8, "q_group_size": 16, "residual_length": 4}
    with pytest.raises(ValueError, match="use a plain cache"):
        model.generate(IDS, cache_implementation="quantized", cache_config=config, **K)


@pytest.mark.parametrize("change", [
    {"version": 2}, {"shape": "round"}, {"basis": "pca"}, {"kind": None}, {"group": None}, {"wide": [1]}, {"kind": "int2"},
])  # fmt: skip
def test_a_format_that_is_not_known_is_refused(folder, change):
    """Every field is read: another one, or one that is missing (here None), is no format of this version."""
    config = load(folder).config
    changed = config.latent_cache | change
    config.latent_cache = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(ValueError, match=r"latent.cache"):
        layer_format(config, 0)


def test_sizes_follow_from_bytes(convert_pico):
    """A quarter of the original's bytes, shared out among layers by measured loss, is held and not exceeded."""
    report = convert_pico("llama", kv_ratio=0.75, cache_dtype="auto", uniform=False)
    held, original = report.cache.bytes_per_token.after, 3 * 32 * 2
    assert 0.5 * 0.75 * original < held <= 0.75 * original


def test_a_group_without_a_quantised_cache_is_refused(cli, sources):
    code, _, err = cli("convert", sources("llama"), "--cache-group", "64")
    assert code == 2 and "cache_group means nothing" in err


def test_healing_sees_the_quantised_cache(convert_pico, sources, tmp_path):
    from mla_convert.core.progress import Progress
    from mla_convert.heal.run import heal
    from mla_convert.heal.settings import HealConfig

    converted = convert_pico("llama", rank=16, rope_dim=8, cache_dtype="int4").out
    report = heal(
        HealConfig(
            folder=converted, out=tmp_path / "healed", teacher=str(sources("llama")), device="cpu", tokens=24 * 512,
            data=str(sources("llama").parent / "text.txt"), length="64", step_tokens=512, micro_tokens=256, lr=0.01,
            evaluations=4, eval_windows=2, eval_length=48, eval="package:mla_demo/calibration.txt.gz", self_share=0, noise=0,
        ),
        Progress(quiet=True),
    )  # fmt: skip
    before, after = report.heal.before.probes.next_token.kl.value, report.probes.next_token.kl.value
    assert after < before and report.cache.latent_cache["kind"] == "int4"
    assert load(tmp_path / "healed").config.latent_cache == report.cache.latent_cache
