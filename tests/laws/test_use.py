"""Common uses of a converted model: adapters, quantised weights, caches of all kinds, training."""

import pico
import pytest
import torch
from transformers import AutoModelForCausalLM
from uses import FEATURES, IDS, cached_error, load

import mla_convert  # noqa: F401  (registers the converted classes)
from mla_convert.modeling.decode_mla import absorbed_attention, linear_map


@pytest.fixture(params=["llama", "qwen3"])
def folder(request, convert_pico):
    return convert_pico(request.param, rank=22, rope_dim=10).out


ADAPTERS = {
    "lora": lambda peft: peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    "lora on kv_b_proj": lambda peft: peft.LoraConfig(target_modules=["kv_b_proj"], task_type="CAUSAL_LM"),
    "dora": lambda peft: peft.LoraConfig(target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "ia3": lambda peft: peft.IA3Config(
        target_modules=["kv_b_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_count_in_cached_decoding(folder, kind):
    peft = pytest.importorskip("peft")
    plain = load(folder)
    before = plain(input_ids=IDS, use_cache=False).logits
    adapted = peft.get_peft_model(plain, ADAPTERS[kind](peft)).eval()
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    with torch.no_grad():
        unmerged = adapted(input_ids=IDS, use_cache=False).logits
    assert (unmerged - before).abs().max() > 0.01 * (before.max() - before.min())
    assert cached_error(adapted) < 1e-5
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS, use_cache=False).logits, unmerged, atol=1e-3, rtol=1e-4)
    assert cached_error(merged) < 1e-5


def test_every_adapter_learns(folder):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load(folder), ADAPTERS["lora"](peft)).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


def test_prompt_and_prefix_adapters_do_as_with_the_original(sources, convert_pico):
    """Virtual tokens are embeddings or rows of the original's cache; at full rank the text is the same."""
    peft = pytest.importorskip("peft")
    texts = []
    for folder in (sources("llama"), convert_pico("llama", rank="full", rope_dim="full").out):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            load(folder), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        ).eval()
        adapted.prompt_encoder.default.embedding.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        texts.append(adapted.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


class Scaled(torch.nn.Linear):
    """A projection whose stored weight is not the matrix that it multiplies by."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight / 4)


def test_projections_are_asked_and_not_read_where_they_are_not_plain(folder):
    model = load(folder)
    for module in list(model.modules()):
        for name in ("kv_b_proj", "q_b_proj"):
            if hasattr(module, name):
                linear = getattr(module, name)
                scaled = Scaled(linear.in_features, linear.out_features, bias=False)
                scaled.weight.data = linear.weight.data * 4
                setattr(module, name, scaled)
                torch.testing.assert_close(linear_map(scaled), linear.weight)
    assert cached_error(model) < 1e-5
    torch.testing.assert_close(
        model(input_ids=IDS, use_cache=False).logits,
        load(folder)(input_ids=IDS, use_cache=False).logits,
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_projection_with_a_bias_is_not_a_matrix():
    linear = torch.nn.Linear(4, 6)
    assert linear_map(linear) is None
    torch.nn.init.zeros_(linear.bias)
    torch.testing.assert_close(linear_map(linear), linear.weight)


@pytest.fixture(scope="module")
def wide(convert_folder, tmp_path_factory):
    """A converted model with sizes that are multiples of 64, which 4-bit kernels require."""
    sizes = dict(hidden_size=128, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    config = pico.CONFIG_MAPPING["llama"](**pico.COMMON | sizes)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide") / "source"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(pico.text())
    return convert_folder(folder, rank=64, rope_dim=32).out


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=str)
def test_weights_in_few_bits(wide, options):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = load(wide, quantization_config=BitsAndBytesConfig(**options), device_map="cpu")
    # 8-bit activations, 16-bit products: the original has the same error
    assert cached_error(model) < 0.05


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_weights_of_torchao(folder, kind):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = getattr(quantization, kind)()
    model = load(folder, quantization_config=TorchAoConfig(config), device_map="cpu")
    assert type(model.model.layers[0].self_attn.kv_b_proj.weight) is not torch.nn.Parameter
    assert cached_error(model) < 1e-4


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_quantised_caches_take_any_size(convert_pico, backend):
    """Sizes that are no multiple of a cache's groups, as allocated ones are."""
    pytest.importorskip("hqq" if backend == "hqq" else "optimum.quanto")
    model = load(convert_pico("llama", rank=22, rope_dim=10).out)
    plain = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    config = {"backend": backend, "nbits": 8 if backend == "hqq" else 4, "q_group_size": 16, "residual_length": 4}
    found = model.generate(
        IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation="quantized", cache_config=config
    )
    assert found.shape == plain.shape and torch.equal(found[:, :18], plain[:, :18])  # the first is read off the prompt


def test_placed_by_accelerate_with_weights_on_disk(folder, tmp_path):
    places = {"model.layers.1": "disk", "model.layers.0": "cpu", "model.layers.2": "cpu", "model.embed_tokens": "cpu",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(folder, device_map=places, offload_folder=tmp_path)
    assert cached_error(model) < 1e-5
    assert cached_error(load(folder, device_map="auto")) < 1e-5


def test_continuous_batching_is_refused(folder):
    model = load(folder)
    for way in ("generate_batch", "init_continuous_batching"):
        with pytest.raises(NotImplementedError, match="caches latents"):
            getattr(model, way)([[5, 6, 7]])


def test_an_argument_that_is_not_known_is_refused(folder):
    model = load(folder)
    with pytest.raises(
        TypeError, match="was given tree_mask=Tensor, which the code of this converted model does not know"
    ):
        model(input_ids=IDS, tree_mask=torch.ones(2, 17))
    with pytest.raises(TypeError, match="caches latents in a transformers Cache, and was given object"):
        model.model.layers[0].self_attn(torch.zeros(1, 3, 48), past_key_values=object())


def test_training_with_and_without_checkpoints(folder):
    gradients = []
    for checkpointing in (False, True):
        model = load(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(model.model.layers[0].self_attn.kv_b_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_step_of_the_trainer(folder, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = load(folder)
    before = model.model.layers[0].self_attn.kv_b_proj.weight.clone()
    settings = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=0.01,
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, settings, train_dataset=rows).train()
    assert not torch.equal(before, model.model.layers[0].self_attn.kv_b_proj.weight)
    assert cached_error(model.eval()) < 1e-5


def test_exported_by_torch(folder):
    model = load(folder)
    program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_cached_rows_that_nobody_sees_may_be_nan(additive, need_weights):
    torch.manual_seed(0)
    query, q_rope = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 4)
    latent, k_rope = torch.randn(2, 1, 10, 8), torch.randn(2, 1, 10, 4)
    mask = torch.ones(2, 1, 2, 10, dtype=torch.bool)
    mask[0, :, :, :3] = mask[1, :, :, 5:7] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    expected = absorbed_attention(query, q_rope, latent, k_rope, given, 0.3, need_weights)[0]
    for rows in (latent, k_rope):
        rows[0, :, :3] = rows[1, :, 5:7] = torch.nan
    torch.testing.assert_close(absorbed_attention(query, q_rope, latent, k_rope, given, 0.3, need_weights)[0], expected)


def test_a_step_of_trl(folder, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    settings = trl.SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        max_length=32,
    )  # fmt: skip
    rows = Dataset.from_dict(
        {"text": ["The people of the islands.", "Bread and salt.", "They sailed.", "A house of stone."]}
    )
    model = load(folder)
    before = model.model.layers[0].self_attn.kv_b_proj.weight.clone()
    trl.SFTTrainer(model, args=settings, train_dataset=rows, processing_class=pico.tokenizer()).train()
    assert not torch.equal(before, model.model.layers[0].self_attn.kv_b_proj.weight)


@torch.no_grad()
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_generation_in_all_ways(sources, convert_pico, name, feature):
    ours, original = load(convert_pico(name, rank="full", rope_dim="full").out), load(sources(name))
    assert torch.equal(FEATURES[feature](ours, original), FEATURES[feature](original, original))


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)  # llama's operations, and norms
def test_compiled_by_torch(folder):
    model = load(folder)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        found = torch.compile(model, backend="aot_eager")(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_needs_equal_widths_is_refused(folder, attention):
    with pytest.raises((ValueError, ImportError)):
        load(folder, attn_implementation=attention)
