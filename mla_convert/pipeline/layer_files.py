"""Files of a conversion's layers: what is read and written of a layer, of embeddings and head, and drafts of unfinished layers.

An interrupted run's files are read back instead of being made again.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mla_convert.core import runtime
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.method.refine.block import LayerPair
from mla_convert.source.checkpoint.reader import check_finite
from mla_convert.write.writer import Writer

# Source tensors were already checked for NaN and infinity, so a result that is not finite comes from the conversion.
FAILED = "it was finite before its conversion; try another --seed, --calib-samples or --dtype float32, and report it"


class LayerReader:
    """Reads the tensors of layers; beside a GPU the next layer's while one is converted. A context."""

    def __init__(self, layerwise: LayerwiseModel):
        """A reader of the source's layers."""
        self.layerwise = layerwise
        self._in_background = runtime.in_background(layerwise.device)
        self._thread = ThreadPoolExecutor(1, "reader")
        self._begun: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __enter__(self) -> LayerReader:
        """The reader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what was begun."""
        self._begun = None
        self._thread.shutdown(cancel_futures=True)

    def begin(self, index: int) -> None:
        """Begin to read a layer, if that is done in the background."""
        if self._in_background:
            self._begun = index, self._thread.submit(self.layerwise.layer_tensors, index)

    def read(self, index: int) -> dict[str, Tensor]:
        """All tensors of a layer as stored, by their full names.

        Raises:
            InputError: one is not finite.
        """
        begun, self._begun = self._begun, None
        return begun[1].result() if begun and begun[0] == index else self.layerwise.layer_tensors(index)


@dataclass
class LayerFiles:
    """The files of one conversion, by layer.

    Attributes:
        layerwise: the source model.
        layers: of the source, converted or not.
        dtype: that is written; None for the source's own.
        writer: of the output folder.
    """

    layerwise: LayerwiseModel
    layers: int
    dtype: torch.dtype | None
    writer: Writer

    def write_embeddings_and_head(self) -> None:
        """Write every tensor outside the layers: embeddings first, then the rest (final norm, head), then other parts."""
        reader, inside = self.layerwise.source.reader, self.layerwise.source.family.layers + "."
        # a tied head that is stored too is no parameter of its own
        parameters = {name for name, _ in self.layerwise.model.named_parameters()}
        outside = [name for name in reader.names() if not name.startswith(inside) and name in parameters]
        for index, first in ((0, True), (self.layers + 1, False)):
            names = [name for name in outside if name.startswith(self.layerwise.embedding) == first]
            if self._shard(index) not in self.writer.finished:
                tensors = reader.read(names)
                check_finite(tensors)
                self.writer.write_shard(self._shard(index), self._named(self._stored(tensors)))
                del tensors
                runtime.return_freed_memory()
        whole = self.layerwise.source.whole
        if whole and self._shard(self.layers + 2) not in self.writer.finished:
            self.writer.write_shard(self._shard(self.layers + 2), self._stored(whole.other_tensors()))

    def is_written(self, index: int) -> bool:
        """Whether an earlier run or this one has written a layer."""
        return self._shard(index + 1) in self.writer.finished

    def entry(self, index: int) -> dict[str, Any]:
        """The report's entry of a written layer."""
        return self.writer.finished[self._shard(index + 1)]["note"]

    def write(self, layer: LayerPair, entry: dict[str, Any]) -> None:
        """Write a layer with its report entry; its student then has the weights as they were written.

        Raises:
            InputError: a weight is not finite in the dtype that is written.
        """
        tensors = self._tensors(layer)
        # What is written as it was read has been checked.
        check_finite(
            {name: tensor for name, tensor in tensors.items() if tensor is not layer.tensors.get(name)},
            self._overflow_hint(layer) or FAILED,
        )
        self.writer.write_shard(self._file(layer), self._named(tensors), entry)
        self._load(layer, tensors)

    def load(self, layer: LayerPair) -> None:
        """Load the student of a layer that an earlier run has written."""
        tensors, whole = self.writer.load_shard(self._file(layer)), self.layerwise.source.whole
        self._load(layer, {whole.inner(name): tensor for name, tensor in tensors.items()} if whole else tensors)

    def write_draft(self, block: list[LayerPair], entries: list[dict[str, Any]]) -> None:
        """Keep the students of a block whose last steps are to come, which may be an hour later."""
        if (file := _draft(block)) not in self.writer.drafts:
            tensors = {
                f"{layer.index}.{name}": tensor.detach().cpu()
                for layer in block
                if layer.student is not None
                for name, tensor in layer.student.state_dict().items()
            }
            if tensors:
                self.writer.write_draft(file, tensors, [self._file(layer) for layer in block], entries)

    def load_draft(self, block: list[LayerPair]) -> list[dict[str, Any]]:
        """Load the students of a block that an interrupted run has drafted; their report entries, none if it has not."""
        if (file := _draft(block)) not in self.writer.drafts:
            return []
        tensors = self.writer.load_shard(file)
        for layer in block:
            prefix = f"{layer.index}."
            if layer.student is not None:
                layer.student.load_state_dict(
                    {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                )
        return self.writer.drafts[file]["note"]

    def drop_drafts(self) -> None:
        """Delete the drafts, once every layer in them is written."""
        self.writer.drop_drafts()

    def _file(self, layer: LayerPair) -> str:
        return self._shard(layer.index + 1)

    def _shard(self, index: int) -> str:
        """File name of the embeddings (0), layer i (i + 1), norm and head (number of layers + 1) or other parts (+ 2)."""
        count = self.layers + (3 if self.layerwise.source.whole else 2)
        return f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def _named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under their names in the folder: of a multimodal model, those in the whole."""
        whole = self.layerwise.source.whole
        return {whole.name(name): tensor for name, tensor in tensors.items()} if whole else tensors

    def _stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the dtype that is written: the source's own unless another was asked for."""
        if self.dtype is None:
            return tensors
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def _attention_prefix(self, layer: LayerPair) -> str:
        return f"{self.layerwise.layer_prefix(layer.index)}{layer.attention_name}."

    def _tensors(self, layer: LayerPair) -> dict[str, Tensor]:
        """Tensors of a layer in the output: the source's without its attention, and the student's, in the output dtype."""
        source, prefix = self.layerwise.source, self._attention_prefix(layer)
        if layer.student is None:
            return self._stored(layer.tensors)
        kept = {name: tensor for name, tensor in layer.tensors.items() if not source.is_replaced(name)}
        dtype = self.dtype or source.dtype
        student = {
            prefix + name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in layer.student.state_dict().items()
        }
        return {**self._stored(kept), **student}

    def _overflow_hint(self, layer: LayerPair) -> str | None:
        """Advice where the student is finite in float32 and may not be in the output dtype, such as float16."""
        dtype = self.dtype or self.layerwise.source.dtype
        # bfloat16 has the range of float32: all that is finite in one is so in the other.
        if layer.student is None or torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max:
            return None
        if not all(tensor.isfinite().all() for tensor in layer.student.state_dict().values()):
            return None
        return f"{str(dtype).removeprefix('torch.')} has no room for it; give --dtype bfloat16 or float32"

    def _load(self, layer: LayerPair, tensors: dict[str, Tensor]) -> None:
        """Load the student as it was written, rounding included: later layers see the model that users will load."""
        if layer.student is None:
            return
        prefix = self._attention_prefix(layer)
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        layer.student.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})


def _draft(block: list[LayerPair]) -> str:
    return f"draft-{block[0].index + 1:05d}.safetensors"
