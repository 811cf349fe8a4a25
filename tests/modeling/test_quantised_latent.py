"""Rows of the quantised latent cache: their bytes, their error, and the straight-through form."""

from types import SimpleNamespace

import pytest
import torch

from mla_convert.modeling.latent_format_mla import LatentFormat, layer_format
from mla_convert.modeling.quantised_latent_mla import dequantise_rows, pass_through, quantise_rows

FORMATS = [
    LatentFormat(kind, rank, rope_dim, group, wide if kind == "mixed" else -1, rope)
    for kind in ("fp8", "int8", "int4", "mixed")
    for rank, wide in ((64, 32), (80, 16), (512, 128), (6, 2))
    for rope_dim, rope in ((0, "bf16"), (16, "bf16"), (16, "fp8"), (64, "int8"), (48, "int4"))
    for group in (0, 32, 128)
    if rope != "int4" or kind in ("int4", "mixed")
]


def numbers(fmt, dtype=torch.float32):
    generator = torch.Generator().manual_seed(fmt.rank + fmt.rope_dim)
    return tuple(
        torch.randn(2, 1, 5, n, generator=generator, dtype=torch.float32).to(dtype) for n in (fmt.rank, fmt.rope_dim)
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows_have_the_stated_bytes_and_equal_the_straight_through_form(fmt):
    latent, rope = numbers(fmt)
    latent[0, 0, 0] = 0
    rows = quantise_rows(fmt, latent, rope)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 1, 5, fmt.row_bytes) and fmt.row_bytes % 16 == 0
    restored, through = dequantise_rows(fmt, rows), pass_through(fmt, latent, rope)
    assert all(torch.equal(a, b) for a, b in zip(restored, through, strict=True))
    most = {"fp8": 0.002, "int8": 0.001, "int4": 0.03, "mixed": 0.03}[fmt.kind]
    assert (restored[0] - latent).square().mean() < most and not restored[0][0, 0, 0].any()
    most = 0.03 if fmt.rope == "int4" else 0.002
    assert (restored[1] - fmt.spread(rope)).square().sum() < most * max(rope.square().sum(), 1)


def test_bytes_of_a_mixed_row():
    """The layout of the documentation, byte by byte."""
    fmt = LatentFormat("mixed", rank=48, rope_dim=2, group=32, wide=8, rope="fp8")
    assert (fmt.codes4_at, fmt.rope_at, fmt.scales_at, fmt.row_bytes) == (16, 48, 64, 80)
    assert fmt.groups == (8, 32, 8) and fmt.scales == 4
    latent = torch.zeros(48)
    latent[3], latent[8], latent[9], latent[28], latent[45] = 127.0, -8.0, 3.0, 7.0, 16.0
    row = quantise_rows(fmt, latent, torch.tensor([448.0, -1.0])).tolist()
    assert row[3] == 127 and row[:3] == [0, 0, 0]
    assert row[16] == (-8 + 8) | (7 + 8) << 4 and row[17] == (3 + 8) | 8 << 4
    # the largest number of a group has code -8: its scale is -2
    assert row[16 + 17] == 8 | 0 << 4
    scales = torch.tensor(row[64:72], dtype=torch.uint8).view(torch.float16)
    assert scales.tolist() == [1.0, 1.0, -2.0, 1.0]
    assert row[48:50] == torch.tensor([448.0, -1.0]).to(torch.float8_e4m3fn).view(torch.uint8).tolist()


@pytest.mark.parametrize(
    ("key", "value"),
    [("version", 2), ("version", True), ("kind", None), ("group", None), ("group", "48"), ("group", 48.0), ("rope", 4),
     ("wide", None), ("wide", []), ("wide", [2.0, 2.0]), ("wide", ["2", "2"]), ("wide", 2), ("more", 1)],
)  # fmt: skip
def test_other_entries_in_the_configuration_are_refused(key, value):
    """None is read as something else, and no type ends in another error."""
    entry = {"version": 1, "kind": "mixed", "group": 48, "rope": "fp8", "wide": [2, 2]}
    config = SimpleNamespace(
        num_hidden_layers=2, layer_rank=lambda _: 16, layer_rope_dim=lambda _: 8, latent_cache=entry
    )
    assert layer_format(config, 1) == LatentFormat("mixed", 16, 8, 48, 2, "fp8")
    config.latent_cache = entry | {key: value}
    with pytest.raises(ValueError, match=r"config.json has latent_cache .*(does not know|states a number wide)"):
        layer_format(config, 1)


def test_scales_of_4_bits_have_the_least_error():
    """Of three scales; a tenth of the mean squared error of long groups is saved, and exact numbers stay exact."""
    fmt = LatentFormat("int4", 128, 0, 128)
    values = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    none = values[:, :0]
    error = (pass_through(fmt, values, none)[0] - values).square().sum(1)
    largest = values.gather(1, values.abs().argmax(1, keepdim=True)) / -8
    tried = []
    for factor in (1, 0.95, 0.9):
        scale = (largest * factor).half().float()
        tried.append((values - (values / scale).round().clamp(-8, 7) * scale).square().sum(1))
    torch.testing.assert_close(error, torch.stack(tried).amin(0))
    assert 0.88 < error.mean() / tried[0].mean() < 0.92
    whole = torch.arange(-8.0, 8).repeat(8)[None] * 0.5
    assert torch.equal(pass_through(fmt, whole, none[:1])[0], whole)


def test_a_rotary_key_in_4_bits_is_part_of_the_latent():
    """Scores of mixed queries with mixed keys are those of both as they were."""
    fmt = LatentFormat("mixed", 48, 12, 32, 16, "int4")
    assert fmt.joint == LatentFormat("mixed", 60, 0, 32, 16) and fmt.row_bytes == fmt.joint.row_bytes == 64
    latent, key, query = torch.randn(7, 48), torch.randn(7, 12), torch.randn(3, 12)
    rows = quantise_rows(fmt, latent, key)
    torch.testing.assert_close(rows, quantise_rows(fmt.joint, torch.cat([latent, fmt.spread(key)], 1), key[:, :0]))
    torch.testing.assert_close(fmt.spread(query) @ fmt.spread(key).T, query @ key.T, rtol=1e-5, atol=1e-5)
    assert not torch.equal(fmt.spread(key), key)


def test_a_rotary_key_in_int8_is_rounded_less_than_in_e4m3():
    keys = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    errors = {
        rope: float(
            (pass_through(LatentFormat("int8", 32, 64, rope=rope), keys[:, :32], keys)[1] - keys).square().mean()
        )
        for rope in ("bf16", "fp8", "int8")
    }
    assert errors["bf16"] < errors["int8"] < 0.1 * errors["fp8"]


def test_gradient_is_that_of_the_identity():
    fmt = LatentFormat("int4", 64, 16, 32, rope="fp8")
    latent, rope = (part.requires_grad_() for part in numbers(fmt))
    cached, key = pass_through(fmt, latent, rope)
    assert not torch.equal(cached, latent)
    (cached.sum() + 2 * key.sum()).backward()
    assert (latent.grad == 1).all() and (rope.grad == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_alike(dtype):
    fmt = LatentFormat("mixed", 96, 32, 32, 32, "fp8")
    latent, rope = numbers(fmt, dtype)
    restored, through = dequantise_rows(fmt, quantise_rows(fmt, latent, rope), dtype), pass_through(fmt, latent, rope)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(restored, through, strict=True))


def test_numbers_beyond_float16_scales_stay_finite():
    fmt = LatentFormat("int8", 32, 2, 32)
    restored, _ = dequantise_rows(fmt, quantise_rows(fmt, torch.full((1, 32), 1e9), torch.zeros(1, 2)))
    assert restored.isfinite().all() and (restored > 1e6).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "int3"},
        {"kind": "int8", "rope": "int4"},
        {"kind": "int4", "rope": "int3"},
        {"kind": "int4", "group": 16},
        {"kind": "int4", "wide": 8},
        {"kind": "mixed"},
        {"kind": "mixed", "wide": 65},
        {"kind": "mixed", "wide": 33},
    ],
)
def test_impossible_rows_are_refused(fields):
    with pytest.raises(ValueError, match="latent cache"):
        LatentFormat(rank=64, rope_dim=16, **fields)
