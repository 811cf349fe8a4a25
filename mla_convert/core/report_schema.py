"""What the figures of a report.json may be, checked before a page, a card or a terminal shows them. Imports no torch.

A report comes with a downloaded model and may hold anything. Where a number is expected only a number passes, so that what shows
it need not ask again; words are escaped where they are shown. Keys that are not named here are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mla_convert.core.errors import InputError
from mla_convert.core.report_file import NOT_EVALUATED

Check = Callable[[Any, str], None]
LARGEST = 1e18  # of any figure: beyond that nothing here was measured
MOST_LAYERS = 4096


def _fail(where: str, wanted: str, value: Any) -> InputError:
    shown = repr(value)
    return InputError(
        f"report.json is not that of a conversion: {where} should be {wanted}, and is {shown[:60]}{'…' * (len(shown) > 60)}"
    )


def _number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(where, "a number", value)
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise _fail(where, "a finite number", value)


def _amount(value: Any, where: str) -> None:
    _number(value, where)
    if value < 0:
        raise _fail(where, "no less than 0", value)


def _count(value: Any, where: str) -> None:
    _amount(value, where)
    if not isinstance(value, int):
        raise _fail(where, "a whole number", value)


def _words(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise _fail(where, "words", value)


def _maybe(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _object(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """A JSON object with these entries; optional ones may be missing or null."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _fail(where or "it", "an object", value)
        for key, inner in required.items():
            path = f"{where}.{key}" if where else key
            if key not in value:
                raise InputError(f"report.json is not that of a conversion: it has no {path}")
            inner(value[key], path)
        for key, inner in (optional or {}).items():
            if value.get(key) is not None:
                inner(value[key], f"{where}.{key}" if where else key)

    return check


def _each(inner: Check, most: int | None = None) -> Check:
    """A list of such things."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise _fail(where, "a list", value)
        if most is not None and len(value) > most:
            raise InputError(f"report.json is not that of a conversion: {where} has {len(value)} entries")
        for index, item in enumerate(value):
            inner(item, f"{where}[{index}]")

    return check


def _table(inner: Check) -> Check:
    """An object whose keys are free."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _fail(where, "an object", value)
        for key, item in value.items():
            inner(item, f"{where}.{key}")

    return check


def _context(value: Any, where: str) -> None:
    _object({"before": _amount, "after": _amount})(value, where)
    if not where.rpartition(".")[2].isdecimal() or len(where.rpartition(".")[2]) > 12:
        raise _fail(where, "under a number of tokens", value)


def _licence(value: Any, where: str) -> None:
    for name in value if isinstance(value, list) else [value]:
        _words(name, where)


def _anything(value: Any, where: str) -> None:
    return


def _evaluation(value: Any, where: str) -> None:
    if isinstance(value, dict) and value.get("skipped"):  # --eval none: there are no figures
        if value != NOT_EVALUATED:
            raise _fail(where, "without figures", value)
        return
    _figures(value, where)


def _kinds(value: Any, where: str) -> None:
    """The packaged suite's kinds of text: their names are shown as they are, so that they are letters."""
    _table(_kind)(value, where)
    for name in value:
        _kind_name(name, where)


def _kind_name(value: Any, where: str) -> None:
    if not (isinstance(value, str) and value.isalpha() and value.islower() and len(value) <= 32):
        raise _fail(where, "named by a word in small letters", value)


_pair = _object({"before": _amount, "after": _amount})
_mean = _object({}, {"value": _number, "error": _amount})
_side = _object({"value": _maybe(_amount)}, {"log_error": _amount, "windows": _count, "length": _count})
_measured = {"text": _words, "protocol": _words, "before": _side, "after": _side, "ratio": _maybe(_amount)}
_held_out = _object(_measured, {"ratio_log_error": _amount})
_kind = _object({"after": _side}, {
    "before": _side, "ratio": _amount, "ratio_log_error": _amount, "agreement": _mean,
    "kl": _object({}, {"value": _number, "error": _amount, "p99": _number}),
})  # fmt: skip
_suite = _object({"protocol": _words, "kinds": _kinds}, {
    "windows": _count, "length": _count, "kl": _mean, "agreement": _mean,
    "worst": _object({"kind": _kind_name}, {"ratio": _amount}),
})  # fmt: skip
_figures = _object(
    _measured, {"ratio_log_error": _amount, "held_out": _held_out, "kl": _mean, "agreement": _mean, "suite": _suite}
)
_entry = _object({}, {
    "layer": _count, "kv_lora_rank": _count, "qk_rope_head_dim": _count,
    "plane_frequencies": _each(_count), "energy": _table(_maybe(_number)),
    **{f"{name}{step}": _amount for name in ("output_error", "residual_error") for step in ("", "_closed_form")},
})  # fmt: skip
_probe = _object({}, {"match": _mean, "log_probability": _mean})
_cell = _object({}, {"match": _number, "log_probability": _number})
_beyond = _object({}, {
    "next_token": _object({"kl": _mean, "agreement": _mean, "text": _words, "protocol": _words}),
    "greedy": _object({"prompts": _count, "prompt_tokens": _count, "tokens": _count, "text": _words, "prefix": _mean,
                       "exact": _mean}),
    "passkey": _object({"keys": _count, "guessing": _number}, {
        "lengths": _each(_object({"length": _count}, {"before": _probe, "after": _probe})),
        "results": _each(_object({"length": _count, "depth": _number}, {"before": _cell, "after": _cell})),
    }),
    "tasks": _object({"harness": _words}, {
        "limit": _count,
        "results": _table(_object({"metrics": _table(_object({}, {"before": _mean, "after": _mean}))})),
    }),
})  # fmt: skip
_curve = _each(_object({"tokens": _amount}, {"kl": _number}))
_heal = _object({}, {
    "curve": _curve, "text": _words, "against": _words, "device": _words, "stopped": _words, "tokens": _amount,
    "seconds": _amount, "best_tokens": _amount,
    "settings": _object({}, {"train": _words, "self_share": _amount, "ce_weight": _amount}),
    "before": _object({"evaluation": _evaluation}, {"beyond": _beyond}),
})  # fmt: skip
_speed = _object({"context": _count, "before": _amount, "after": _amount})
CHECK = _object(
    {
        "source": _object({"name": _words}, {
            "revision": _words, "model_type": _words, "key_value_heads": _count, "head_dim": _count,
            "license": _licence, "license_name": _words, "license_link": _words,
        }),
        "settings": _table(_anything),
        "versions": _table(_maybe(_words)),
        "device": _words,
        "cache": _object({
            "kv_lora_rank": _amount, "qk_rope_head_dim": _amount, "bytes_per_number": _amount, "share_saved": _number,
            "numbers_per_token_per_layer": _pair, "bytes_per_token": _pair, "bytes_at_context": _table(_context),
        }),
        "evaluation": _evaluation,
        "calibration": _object({"protocol": _words}, {"self_written": _amount}),
        "layers": _each(_entry, MOST_LAYERS),
        "phases": _table(_object({"seconds": _amount}, {"peak_device_bytes": _amount, "peak_host_bytes": _amount})),
        "seconds": _amount,
        "checksums": _table(_words),
    },
    {
        "notes": _each(_words),
        "self_check": _object({"versions": _table(_words), "layers": _count, "of_layers": _count}),
        "beyond": _beyond,
        "heal": _heal,
        "sweep": _each(_object({"share": _number}, {"ratio": _number, "stderr": _amount, "numbers": _number})),
        "bench": _object({}, {"device": _words, "decode": _each(_speed)}),
    },
)  # fmt: skip


def check_report(content: Any) -> None:
    """Refuse what is no report of a conversion, or holds another kind of value where a figure or words belong.

    Raises:
        InputError: names the first such entry.
    """
    try:
        CHECK(content, "")
    except RecursionError:
        raise InputError("report.json is not that of a conversion: it is nested too deeply") from None
