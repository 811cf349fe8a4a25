"""What the tests of healing share."""

import pytest


@pytest.fixture
def small(convert_pico, sources):
    """A pico model at a third of its cache, and settings that heal it in a second or two."""
    converted = convert_pico("llama", rank=16, rope_dim=6, refine_steps=4).out
    text = sources("llama").parent / "text.txt"
    settings = {
        "folder": converted, "teacher": str(sources("llama")), "data": str(text), "device": "cpu", "tokens": 24 * 512,
        "length": "64", "step_tokens": 512, "micro_tokens": 256, "evaluations": 4, "lr": 0.01, "eval_windows": 2,
        "eval_length": 48, "eval": "package:mla_demo/calibration.txt.gz", "self_share": 0, "noise": 0,
    }  # fmt: skip
    return settings
