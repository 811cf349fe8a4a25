"""Healing: the loss, its gradients, and the pair of models."""

import warnings

import pico
import pytest
import torch
import torch.nn.functional as F

from mla_convert.core.cuda_graph import CaptureError
from mla_convert.core.errors import InputError
from mla_convert.core.progress import Progress
from mla_convert.heal import HealSettings, cuda_graph, windows
from mla_convert.heal.teacher_student import TeacherStudent
from mla_convert.modeling import distillation
from mla_convert.modeling.distillation import distillation_loss
from mla_convert.modeling.head import Head
from mla_convert.modeling.loss_terms import IGNORED, LossWeights
from mla_convert.source.load_model import find_model, load_model

CPU = torch.device("cpu")
QUIET = Progress(quiet=True)


def pair_of(source, converted, **settings):
    settings = HealSettings(tokens=1, **settings)
    student = load_model(find_model(str(converted)), torch.float32, CPU)
    return TeacherStudent.build(
        student, load_model(find_model(str(source)), torch.float32, CPU), settings, torch.float32
    )


# The loss


@pytest.mark.parametrize(
    "mix", [LossWeights(), LossWeights(0.5, 0.7, 1.0), LossWeights(1.0, 0.3, 2.0), LossWeights(0.0, 1.0)]
)
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, mix):
    torch.manual_seed(0)
    model, original = pico.model("llama").requires_grad_(True), pico.model("llama").requires_grad_(False)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(4, pico.VOCAB, (2, 24))
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    labels[0, 5] = IGNORED

    def run(chunked):
        model.zero_grad()
        hidden, theirs = (each.model(ids, use_cache=False).last_hidden_state for each in (model, original))
        if chunked:
            loss, sums = distillation_loss(hidden, theirs, labels, Head(model), Head(original), mix)
        else:
            heat, tokens = mix.temperature, ids.numel()
            ours, target = model.lm_head(hidden).flatten(0, 1), original.lm_head(theirs).flatten(0, 1)
            kl = F.kl_div(
                (ours / heat).log_softmax(-1), (target / heat).log_softmax(-1), reduction="sum", log_target=True
            )
            ce = F.cross_entropy(ours, labels.flatten(), ignore_index=IGNORED, reduction="sum")
            loss, sums = (mix.kl * heat**2 * kl + mix.ce * ce) / tokens, None
        (loss * 3).backward()
        return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}, sums

    monkeypatch.setattr(distillation, "CHUNK", 7 * pico.VOCAB)  # 48 tokens in chunks of 7
    loss, gradients, sums = run(chunked=True)
    expected, wanted, _ = run(chunked=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert float(sums[0]) == pytest.approx(loss, rel=1e-6)
    for name, gradient in wanted.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(
    ("mix", "dtype"),
    [(LossWeights(), torch.float32), (LossWeights(0.5, 0.7), torch.float32), (LossWeights(), torch.bfloat16)],
)
def test_kernel_is_the_loss(mix, dtype):
    from mla_convert.modeling import distillation_triton as kernel

    draw = torch.Generator().manual_seed(0)
    ours, theirs = (
        5 * torch.randn(7, 4999, generator=draw) for _ in range(2)
    )  # more than one block of the kernel, and no multiple of it
    ours, theirs = ours.to(dtype), (ours + 0.5 * theirs).to(dtype)
    labels = torch.randint(4999, (7,), generator=draw)
    labels[2] = IGNORED
    (sums, slope), (wanted, wanted_slope) = (
        f(ours, theirs, labels, mix, 0.3) for f in (kernel.divergence, distillation.divergence)
    )
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2", "opt", "falcon", "nanochat", "gemma4"]
)
def test_head_gives_the_logits_of_the_model(name):
    model = pico.model(name)
    ids = torch.randint(4, pico.VOCAB, (1, 9))
    with torch.no_grad():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        assert torch.allclose(Head(model)(hidden[0]), model(ids).logits[0], atol=1e-5)


# The pair


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        "gemma2",
        "pythia",
        "gpt2",
        "mixtral",
        "gpt-oss",
        "falcon",
        "hunyuan_v1_dense",
        "ministral3",
        "gemma4-shared",
    ],
)
def test_pair_is_the_converted_model_and_its_original(convert_pico, sources, name):
    converted = convert_pico(name, kv_ratio=0.5).out
    ids = torch.randint(4, pico.VOCAB, (2, 20))
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    original, student = (load_model(find_model(str(each)), torch.float32, CPU) for each in (sources(name), converted))
    with torch.no_grad():
        theirs, ours = (each(ids).logits.log_softmax(-1) for each in (original, student))
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    sizes = {}
    for train in ("all", "attention"):
        pair = pair_of(sources(name), converted, train=train)
        assert pair.shares == (train == "attention")
        loss, sums = pair(ids, labels)
        assert float(loss.detach()) == pytest.approx(kl, rel=1e-3)
        ce = [float(-each[:, :-1].gather(-1, ids[:, 1:, None]).sum() / ids.numel()) for each in (ours, theirs)]
        assert sums[2:].tolist() == pytest.approx(ce, rel=1e-4)
        loss.backward()
        assert all(p.grad is not None for p in pair.parameters() if p.requires_grad)
        sizes[train] = sum(p.numel() for p in {*pair.parameters(), *pair.original.parameters()})
    layers = original.get_submodule(student.config.mla_layers)
    attention = sum(p.numel() for each in layers for p in getattr(each, student.config.mla_attention).parameters())
    assert sizes["all"] - sizes["attention"] == sum(p.numel() for p in original.parameters()) - attention


def test_hidden_states_can_be_part_of_the_loss(convert_pico, sources):
    converted = convert_pico("llama", rank=10, rope_dim=6).out
    ids = torch.randint(4, pico.VOCAB, (1, 20))
    plain, with_hidden = (pair_of(sources("llama"), converted, hidden_weight=weight) for weight in (0.0, 2.0))
    without, loss = (float(each(ids, ids)[0].detach()) for each in (plain, with_hidden))
    with torch.no_grad():
        states = [
            model.base_model(ids, use_cache=False, output_hidden_states=True).hidden_states
            for model in (with_hidden.student, with_hidden.original)
        ]
    parts = [((a - b).square().mean(-1) / b.square().mean(-1)).log1p().mean() for a, b in zip(*states, strict=True)]
    assert loss - without == pytest.approx(2.0 * float(torch.stack(parts).mean()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "attention"])
def test_compiling_changes_nothing(convert_pico, sources, train):
    converted = convert_pico("llama", kv_ratio=0.4, refine_steps=2).out  # layers of several sizes
    ids = torch.randint(5, 200, (2, 24))
    found = []
    for compiled in (False, True):
        pair = pair_of(sources("llama"), converted, train=train)
        if compiled:
            pair.compile()
        loss, _ = pair(ids, ids)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in pair.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_windows_of_one_document_need_no_mask(convert_pico, sources, monkeypatch):
    pair = pair_of(sources("llama"), convert_pico("llama", rank=16, rope_dim=6).out)
    ids = torch.randint(4, pico.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    labels, positions = ids.roll(-1, 1), torch.arange(24).expand(2, -1)
    with torch.no_grad():
        plain, masked = pair(ids, labels)[1], pair(ids, labels, positions)[1]
        packed = pair(ids, labels, positions % 12)[1]
    assert torch.allclose(plain, masked, rtol=1e-5) and not torch.allclose(plain, packed, rtol=1e-3)
    assert pair.student.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("replay", ["right", "wrong", "refused"])
def test_captured_passes_are_checked(monkeypatch, replay):
    """A captured pass has to equal an eager one, else training continues without graphs. The graph is a fake."""
    weight = torch.nn.Parameter(torch.ones(3))
    batches = [
        windows.Batch(torch.full((1, 3), float(n)), torch.zeros(1, 3), torch.zeros(1, 3) if n == 3 else None)
        for n in range(1, 10)
    ]
    eager = []

    def run(ids, labels, positions, counted, grad_scale):
        eager.append(float(ids[0, 0]))
        loss = (weight * ids).sum() * grad_scale
        loss.backward()
        return loss.detach()

    class Captured:
        def __init__(self, run, ids, labels):
            if replay == "refused":
                raise CaptureError("operation not permitted when stream is capturing")
            self.output = None

        def __call__(self, ids, labels):
            scale = 2.0 if replay == "wrong" else 1.0
            weight.grad += scale * ids[0] * 0.5
            self.output = (weight * ids).sum().detach() * 0.5
            return self.output

    monkeypatch.setattr(cuda_graph, "CapturedCall", Captured)
    weight.grad = torch.zeros(3)
    call = cuda_graph.GraphedStep(run, [weight], capture=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in batches:
            weight.grad.zero_()
            assert float(call(batch, 0.5, first=True)) == 1.5 * float(batch.ids[0, 0])
            assert torch.equal(weight.grad, 0.5 * batch.ids[0])
    assert (len(said), call.capture) == ((0, True) if replay == "right" else (1, False))
    first = cuda_graph.EAGER_PASSES + 2  # one of the batches is packed, and runs eagerly
    once_more = [float(first)] if replay == "wrong" else []
    rest = [] if replay == "right" else [float(n) for n in range(first + 1, 10)]
    assert eager == [float(n) for n in range(1, first + 1)] + once_more + rest


def test_gradient_checkpointing_changes_nothing(convert_pico, sources):
    converted, ids = convert_pico("llama", rank=10, rope_dim=6).out, torch.randint(4, pico.VOCAB, (1, 20))
    gradients = []
    for checkpointing in (False, True):
        pair = pair_of(sources("llama"), converted, train="attention")
        if checkpointing:
            pair.checkpoint_gradients()
        pair(ids, ids)[0].backward()
        gradients.append([p.grad for p in pair.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_pair_refuses_what_is_not_the_original(convert_pico, sources, tmp_path):
    other = pico.config("llama")
    other.num_hidden_layers = 2
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(other, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="2 layers"):
        pair_of(tmp_path, convert_pico("llama", rank=10, rope_dim=6).out)
