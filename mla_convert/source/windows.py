"""Token windows cut from texts: for evaluation in order, for calibration at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.source import mixture
from mla_convert.source.tokens import first_tokens, tokenise

# Characters that are tokenised at a time, and the largest number of characters in a token.
PIECE = 1 << 18
CHARACTERS_PER_TOKEN = 16
# Characters per token of the pieces that calibration windows are drawn from: most such pieces contain a complete window.
SPREAD_CHARACTERS = 8


def evaluation_windows(
    text: str, tokenizer: Any, count: int, length: int, label: str, purpose: str = "evaluation"
) -> Tensor:
    """Non-overlapping windows (n, length) from the start of the text, tokenised as one; n <= count.

    Args:
        text: to cut.
        tokenizer: of the model.
        count: largest number of windows.
        length: tokens of a window.
        label: of the text, for messages.
        purpose: of the text, for messages.

    Raises:
        InputError: the text is shorter than one window.
    """
    # A long text is tokenised only as far as `count` windows can reach.
    ids = tokenise(tokenizer, text[: count * length * CHARACTERS_PER_TOKEN], special=True)
    windows = min(count, len(ids) // length)
    if not windows:
        raise InputError(
            f"{purpose} text {label} has {len(ids)} tokens, fewer than one window of {length}: give more text"
        )
    return torch.tensor(ids[: windows * length]).view(windows, length)


def evaluation_protocol(windows: Tensor) -> str:
    """Evaluation windows (n, length) in words."""
    count, length = windows.shape
    return f"{count} window{'s' if count > 1 else ''} of {length} tokens, not overlapping"


def calibration_windows(
    text: str, tokenizer: Any, count: int, length: int, seed: int, label: str, fewest: int | None = None
) -> Tensor:
    """Windows (count, length) from the whole text, in random order.

    Each begins with the tokenizer's beginning-of-sequence token if it adds one: first tokens are attention sinks with
    outlying activations, and served text has them.

    Args:
        text: to draw from.
        tokenizer: of the model.
        count: number of windows.
        length: tokens of a window.
        seed: of the draw.
        label: of the text, for messages.
        fewest: number of windows that suffices if the text has fewer than `count` (None: `count`).

    Raises:
        InputError: the text is too short.
    """
    prefix = first_tokens(tokenizer)
    body = length - len(prefix)
    generator = torch.Generator().manual_seed(seed)
    # A piece may give a quarter more than an equal part: with equal parts, one short piece would leave the count
    # unfilled.
    share = 5 * count // (4 * (1 + len(text) // PIECE))
    # Distant windows first, if there is enough text, because adjacent ones are highly correlated: one window of each
    # small piece, then a share of each large one, then all that there are.
    for characters, most in ((body * SPREAD_CHARACTERS, 1), (PIECE, share), (PIECE, None)):
        windows: list[list[int]] = []
        for piece in torch.randperm(-(-len(text) // characters), generator=generator).tolist():
            ids = tokenise(tokenizer, text[piece * characters : (piece + 1) * characters], special=False)
            starts = range(0, len(ids) - body + 1, body)[:most]
            windows += [prefix + ids[start : start + body] for start in starts]
            if len(windows) >= count:
                break
        if len(windows) >= count:
            break
    least = count if fewest is None else fewest
    if len(windows) < least:
        raise InputError(
            f"calibration text {label} is too short: it holds {len(windows)} windows of {length} tokens and {least} are "
            f"wanted; give more text, or lower --calib-samples or --calib-length"
        )
    order = torch.randperm(len(windows), generator=generator)[:count]
    return torch.tensor([windows[index] for index in order.tolist()], dtype=torch.int64).view(-1, length)


def mixed_windows(
    weighted: list[tuple[str, str, float]], tokenizer: Any, count: int, length: int, seed: int, fewest: int
) -> tuple[Tensor, list[int]]:
    """Windows of several texts in one random order.

    If a text has fewer windows than its share, the others give more.

    Args:
        weighted: (text, label, weight) of each text.
        tokenizer: of the model.
        count: largest number of windows.
        length: tokens of a window.
        seed: of the draw.
        fewest: smallest number of windows.

    Returns:
        Windows (n, length) with fewest <= n <= count, and the number of windows of each text.

    Raises:
        InputError: a text has no window, or all together have fewer than `fewest`.
    """
    if len(weighted) == 1:
        ((text, label, _),) = weighted
        windows = calibration_windows(text, tokenizer, count, length, seed, label, fewest)
        return windows, [len(windows)]
    wanted = mixture.quotas([weight for _, _, weight in weighted], count)
    found = [calibration_windows(text, tokenizer, want, length, seed, label, 1) if want else None
             for (text, label, _), want in zip(weighted, wanted, strict=True)]  # fmt: skip
    held = [0 if windows is None else len(windows) for windows in found]
    for index, (text, label, _) in enumerate(weighted):
        # A text that filled its quota may hold more; one that did not has given all that it has.
        if (missing := count - sum(held)) and held[index] == wanted[index]:
            more = calibration_windows(text, tokenizer, held[index] + missing, length, seed, label, 0)
            found[index], held[index] = more, len(more)
    if sum(held) < fewest:
        raise InputError(
            f"calibration texts are too short: together they hold {sum(held)} windows of {length} tokens and {fewest} are wanted; "
            f"give more text, or lower --calib-samples or --calib-length"
        )
    windows = torch.cat([each for each in found if each is not None and len(each)])
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))], held
