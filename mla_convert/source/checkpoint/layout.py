"""A stored checkpoint under the names and shapes that its transformers model has."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.source.checkpoint.reader import Reader
from mla_convert.source.families.base import Family

# What stands before the names of a language model that is part of a larger one.
PART = re.compile(r"^(model\.)?(language_model|text_model)\.(model\.)?")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


class ModelReader:
    """Reads what the model asks for (`wanted` names) from what is stored; `unused` is whatever else is stored.

    Names may lack the model's prefix (GPT-2's first checkpoints), have one more (the language model of a multimodal one) or
    be older ones, and experts may be stored one by one where the model has them in one tensor.
    """

    def __init__(self, stored: Reader, wanted: Iterable[str], family: Family):
        self._stored = stored
        wanted = set(wanted)
        prefix = family.layers.partition(".")[0] + "."
        self._plain: dict[str, str] = {}
        self._experts: dict[str, dict[tuple[str, int], str]] = {}
        self.unused: list[str] = []
        for name in stored.names():
            new = name
            for before, after in family.renamed:
                new = new.replace(before, after)
            expert = EXPERT.fullmatch(new) if family.experts else None
            inner = PART.sub("", new)
            forms = (name, new, prefix + name, prefix + new, inner, prefix + inner)
            own = next((form for form in forms if form in wanted), None)
            if own:
                if own in self._plain:
                    raise InputError(
                        f"tensors {self._plain[own]} and {name} both stand for {own}: take one of them out"
                    )
                self._plain[own] = name
            elif expert and expert[3] in family.experts:
                down = expert[3] == family.experts[2]
                fused = f"{expert[1]}.{'down_proj' if down else 'gate_up_proj'}"
                self._experts.setdefault(fused, {})[expert[3], int(expert[2])] = name
            else:
                self.unused.append(name)
        self._parts = {name: self._ordered(name, found, family) for name, found in self._experts.items()}

    @staticmethod
    def _ordered(fused: str, found: dict[tuple[str, int], str], family: Family) -> list[list[str]]:
        """Stored names of each expert's parts (gate and up, or down)."""
        kinds = family.experts[2:] if fused.endswith("down_proj") else family.experts[:2]
        count = 1 + max(expert for _, expert in found)
        for kind in kinds:
            for expert in range(count):
                if (kind, expert) not in found:
                    raise InputError(f"expert {expert} of {fused} has no {kind}: fetch the checkpoint again")
        return [[found[kind, expert] for kind in kinds] for expert in range(count)]

    def leave_out(self, name: str, instead: str | None = None) -> None:
        """No longer have the tensor `name`; `instead` has what is stored for it."""
        stored = self._plain.pop(name)
        if instead:
            self._plain[instead] = stored

    def names(self) -> list[str]:
        return [*self._plain, *self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._plain:
            return self._stored.shape(self._plain[name])
        experts = self._parts[name]
        rows, columns = self._stored.shape(experts[0][0])
        for part in (part for parts in experts for part in parts):
            if self._stored.shape(part) != (rows, columns):
                raise InputError(f"tensor {part} has another shape than {experts[0][0]}: the checkpoint is damaged")
        return len(experts), rows * len(experts[0]), columns

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._plain[name] if name in self._plain else self._parts[name][0][0])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        plain = {self._plain[name]: name for name in names if name in self._plain}
        tensors = {plain[name]: tensor for name, tensor in self._stored.read(plain).items()}
        for name in names:
            if name in self._parts:
                tensors[name] = self._fused(name)
        return tensors

    def _fused(self, name: str) -> Tensor:
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        # expert by expert: two copies of them all would be the peak of a conversion
        for place, parts in zip(whole, self._parts[name], strict=True):
            read = self._stored.read(parts)
            place.copy_(torch.cat([read[part] for part in parts]))
        return whole

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._plain:
            return self._stored.rows(self._plain[name], start, stop)
        return self._fused(name)[start:stop]
