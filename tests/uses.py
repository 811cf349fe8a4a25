"""Ways to use a converted model, which several tests try: caches, and features of `generate`."""

import copy

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import mla_convert  # noqa: F401  (registers the converted classes)
from mla_convert.modeling.caching import with_cache

IDS = torch.randint(3, 260, (2, 17), generator=torch.Generator().manual_seed(2))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


@torch.no_grad()
def cached_error(model, ids=IDS):
    """Largest difference of a logit with and without a cache, relative to their range: 12 tokens, then one at a time."""
    cache, whole = DynamicCache(config=model.config), model(input_ids=ids, use_cache=False).logits.float()
    parts = [
        model(input_ids=part, **with_cache(unwrapped(model), cache)).logits for part in ids.split([12, *[1] * 5], dim=1)
    ]
    return ((torch.cat(parts, dim=1).float() - whole).abs().max() / (whole.max() - whole.min())).item()


def unwrapped(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Features of `generate`. At full rank a converted model must give its original's text.
K = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)


def assisted(model, original):
    """Both models have the same assistant, so that the same drafts are accepted."""
    assistant = copy.deepcopy(original)
    torch.manual_seed(3)
    for parameter in assistant.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.generate(IDS[:1], assistant_model=assistant, **K)


def cropped(model, _):
    cache = DynamicCache(config=model.config)
    model(IDS[:1, :9], **with_cache(model, cache))
    cache.crop(-3)
    return model(IDS[:1, 6:10], **with_cache(model, cache)).logits.argmax(-1)


def reused(model, _):
    cache = DynamicCache(config=model.config)
    first = model.generate(IDS[:1], past_key_values=cache, **K)
    return model.generate(torch.cat([first, IDS[1:, :5]], dim=1), past_key_values=cache, **K)


FEATURES = {
    "beams": lambda model, _: model.generate(IDS, num_beams=3, num_return_sequences=2, **K),
    "assisted": assisted,
    "prompt lookup": lambda model, _: model.generate(IDS[:1].repeat(1, 2), prompt_lookup_num_tokens=3, **K),
    "cropped": cropped,
    "reused": reused,
    "chunked prefill": lambda model, _: model.generate(IDS, prefill_chunk_size=5, **K),
    "embeddings": lambda model, _: model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **K),
    "packed": lambda model, _: model(
        IDS[:1], position_ids=torch.tensor([[*range(8), *range(9)]]), use_cache=False
    ).logits.argmax(-1),
}
