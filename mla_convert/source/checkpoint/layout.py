"""A stored checkpoint under the names and shapes of its transformers model."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.source.checkpoint.reader import Reader
from mla_convert.source.families.base import Family

# Prefix of the names of a language model that is part of a multimodal one.
PART = re.compile(r"^(model\.)?(language_model|text_model)\.(model\.)?")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


class ModelReader:
    """Reads the tensors of a model from a checkpoint; `unused` names the stored tensors that the model does not have.

    Stored names may lack the model's prefix (GPT-2's first checkpoints), have an additional one (the language model of a
    multimodal checkpoint) or be older ones. Experts may be stored one by one where the model has them in one tensor, and so
    may the parts of a tensor (`Family.joined`).
    """

    def __init__(self, stored: Reader, wanted: Iterable[str], family: Family):
        """Map the model's names to stored ones.

        Args:
            stored: the checkpoint.
            wanted: names of the model's tensors.
            family: of the model.

        Raises:
            InputError: two stored tensors stand for one of the model, or an expert is incomplete.
        """
        self._stored = stored
        wanted = set(wanted)
        gate_up_down: tuple[str, ...] = family.experts or ()
        # Experts without a gate have no part to fuse the up-projection with.
        into = "gate_up_proj" if len(gate_up_down) > 2 else "up_proj"
        prefix = family.layers.partition(".")[0] + "."
        self._plain: dict[str, str] = {}
        self._experts: dict[str, dict[tuple[str, int], str]] = {}
        self._joined: dict[str, dict[int, str]] = {}
        self.unused: list[str] = []
        for name in stored.names():
            new = name
            for before, after in family.renamed:
                new = new.replace(before, after)
            expert = EXPERT.fullmatch(new)
            inner = PART.sub("", new)
            # From the least to the most changed name: the first that the model has counts.
            forms = (name, new, prefix + name, prefix + new, inner, prefix + inner)
            in_model = next((form for form in forms if form in wanted), None)
            part = next(
                (
                    (new.removesuffix(end) + whole, index)
                    for whole, ends in family.joined
                    for index, end in enumerate(ends)
                    if new.endswith(end)
                ),
                None,
            )
            if in_model:
                if in_model in self._plain:
                    raise InputError(
                        f"tensors {self._plain[in_model]} and {name} both stand for {in_model}: take one of them out"
                    )
                self._plain[in_model] = name
            elif expert and expert[3] in gate_up_down:
                down = expert[3] == gate_up_down[-1]
                fused = f"{expert[1]}.{'down_proj' if down else into}"
                self._experts.setdefault(fused, {})[expert[3], int(expert[2])] = name
            elif part and part[0] in wanted:
                self._joined.setdefault(part[0], {})[part[1]] = name
            else:
                self.unused.append(name)
        for name, stored_parts in self._joined.items():
            count = next(len(ends) for whole, ends in family.joined if name.endswith(whole))
            if len(stored_parts) < count:
                raise InputError(f"{name} lacks a part beside {min(stored_parts.values())}: fetch the checkpoint again")
        self._parts = {name: self._ordered(name, parts, gate_up_down) for name, parts in self._experts.items()}

    @staticmethod
    def _ordered(fused: str, parts: dict[tuple[str, int], str], gate_up_down: tuple[str, ...]) -> list[list[str]]:
        """Stored names of each expert's parts (gate and up, or down)."""
        kinds = gate_up_down[-1:] if fused.endswith("down_proj") else gate_up_down[:-1]
        count = 1 + max(expert for _, expert in parts)
        for kind in kinds:
            for expert in range(count):
                if (kind, expert) not in parts:
                    raise InputError(f"expert {expert} of {fused} has no {kind}: fetch the checkpoint again")
        return [[parts[kind, expert] for kind in kinds] for expert in range(count)]

    def leave_out(self, name: str, instead: str | None = None) -> None:
        """Remove the tensor `name`; the tensor `instead`, if given, gets its stored values."""
        stored = self._plain.pop(name)
        if instead:
            self._plain[instead] = stored

    def names(self) -> list[str]:
        """Names of the model's tensors that are stored."""
        return [*self._plain, *self._parts, *self._joined]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor in the model, without reading it.

        Raises:
            InputError: experts of unequal shapes.
        """
        if name in self._plain:
            return self._stored.shape(self._plain[name])
        if name in self._joined:
            shapes = [self._stored.shape(part) for part in self._joined[name].values()]
            return sum(shape[0] for shape in shapes), *shapes[0][1:]
        experts = self._experts_of(name)
        rows, columns = self._stored.shape(experts[0][0])
        for part in (part for parts in experts for part in parts):
            if self._stored.shape(part) != (rows, columns):
                raise InputError(f"tensor {part} has another shape than {experts[0][0]}: the checkpoint is damaged")
        return len(experts), rows * len(experts[0]), columns

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor, without reading it."""
        if name in self._joined:
            return self._stored.dtype(self._joined[name][0])
        return self._stored.dtype(self._plain[name] if name in self._plain else self._experts_of(name)[0][0])

    def _experts_of(self, name: str) -> list[list[str]]:
        """Stored names of the parts of each expert that make one tensor of the model."""
        if name not in self._parts:
            raise InputError(
                f"tensor {name} is missing from the checkpoint: fetch it again, if config.json belongs to it"
            )
        return self._parts[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU, in their stored dtype and the model's shape."""
        names = list(names)
        plain = {self._plain[name]: name for name in names if name in self._plain}
        tensors = {plain[name]: tensor for name, tensor in self._stored.read(plain).items()}
        for name in names:
            if name in self._parts:
                tensors[name] = self._fused(name)
            elif name in self._joined:
                parts = self._stored.read(self._joined[name].values())
                tensors[name] = torch.cat([parts[part] for _, part in sorted(self._joined[name].items())])
        return tensors

    def _fused(self, name: str) -> Tensor:
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        # one expert at a time: two copies of all experts would be the conversion's peak of memory
        for place, parts in zip(whole, self._parts[name], strict=True):
            read = self._stored.read(parts)
            place.copy_(torch.cat([read[part] for part in parts]))
        return whole

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of one tensor."""
        if name in self._plain:
            return self._stored.rows(self._plain[name], start, stop)
        return self.read([name])[name][start:stop]
