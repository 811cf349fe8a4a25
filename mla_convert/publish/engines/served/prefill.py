"""Prompts of a step: which requests are attended together, and where their tokens lie in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Cached tokens whose keys and values are expanded together in a prefill; a longer sequence is expanded in groups of heads.
PREFILL_TOKENS = 1 << 15
# Rows of the cache of tokens, from requests (S,), counted from the prefill's first, and positions (S,) in them.
RowsOf = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Prefill:
    """Requests of a step with more query tokens than a decode has.

    Attributes:
        first: index of their first query token in the step.
        groups: requests that are attended together.
    """

    first: int
    groups: list[PrefillGroup]


@dataclass
class PrefillGroup:
    """Neighbouring requests of a prefill, whose cached rows are read together.

    Attributes:
        first: index of their first query token, counted from the prefill's first.
        stop: one past their last.
        rows: (S,) int64, where the S tokens that they attend to lie in the cache, request after request.
        query_starts: (requests + 1,) int32, first query token of each request, and the number of all.
        key_starts: (requests + 1,) int32, the same for cached tokens.
        query_lens: query tokens of each request.
        key_lens: cached tokens of each request, its query tokens included.
    """

    first: int
    stop: int
    rows: Tensor
    query_starts: Tensor
    key_starts: Tensor
    query_lens: list[int]
    key_lens: list[int]


def make_prefill(
    first: int, query_lens: Sequence[int], key_lens: Sequence[int], rows_of: RowsOf, device: torch.device
) -> Prefill:
    """A step's prefill, in groups of at most PREFILL_TOKENS cached tokens.

    Args:
        first: index of its first query token in the step.
        query_lens: query tokens of each request; none for one that pads the step.
        key_lens: cached tokens of each request, its query tokens included.
        rows_of: finds tokens in the cache.
        device: of the cache.
    """
    groups: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(query_lens):
        if not length:
            continue
        if not groups or tokens + key_lens[index] > PREFILL_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += key_lens[index]
    starts = [0]
    for length in query_lens:
        starts.append(starts[-1] + length)
    return Prefill(first, [_group(members, starts, query_lens, key_lens, rows_of, device) for members in groups])


def _group(
    members: list[int], starts: list[int], query_lens: Sequence[int], key_lens: Sequence[int], rows_of: RowsOf,
    device: torch.device,
) -> PrefillGroup:  # fmt: skip
    """One group; `members` are indices into the prefill's requests, ascending and without gaps but empty ones."""
    queries, keys = [query_lens[m] for m in members], [key_lens[m] for m in members]

    def on_device(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)

    query_starts = on_device([0, *queries]).cumsum(0)
    key_starts = on_device([0, *keys]).cumsum(0)
    total = sum(keys)
    # With `output_size` the host need not wait for the device to know it.
    request = torch.repeat_interleave(torch.arange(len(members), device=device), on_device(keys), output_size=total)
    position = torch.arange(total, device=device) - key_starts[request]
    rows = rows_of(on_device(members)[request], position)
    return PrefillGroup(
        starts[members[0]], starts[members[-1]] + queries[-1], rows, query_starts.int(), key_starts.int(), queries, keys
    )
