"""Inputs that each layer gets for each token, beside the hidden states (Gemma 3n, Gemma 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_convert.method.calibrate.beside import Beside
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.source.checkpoint.reader import check_finite

# Modules of the decoder that make them: a table of the vocabulary, and a projection of the embeddings with its norm.
TABLE, PARTS = "embed_tokens_per_layer", ("per_layer_model_projection", "per_layer_projection_norm")
# Rows of the table that are read at a time.
ROWS = 4096


def beside_windows(layerwise: LayerwiseModel, windows: Tensor) -> Beside | None:
    """What is beside the hidden states of token windows (N, L) before the first layer; None if nothing ever is."""
    if not layerwise.input_width and layerwise.source.shape.latent_of is None:
        return None
    if not layerwise.input_width or not len(windows):
        return Beside(layerwise.device)
    ids, tokens = windows.unique(return_inverse=True)
    return Beside(layerwise.device, tokens, layer_inputs(layerwise, ids))


@torch.no_grad()
def layer_inputs(layerwise: LayerwiseModel, ids: Tensor) -> Tensor:
    """Inputs (U, layers, n) of every layer for distinct tokens (U,), float32, in host memory.

    Of the table, which may be larger than all layers, only the rows of these tokens are kept.

    Raises:
        InputError: a weight is not finite.
    """
    decoder, reader = layerwise.decoder, layerwise.source.reader
    path = layerwise.path_of(decoder)
    name, module = f"{path}.{TABLE}.weight", getattr(decoder, TABLE)
    # Tokens of images and sound, which the table does not have, are those of the first row.
    rows, place = torch.where(ids < module.num_embeddings, ids, 0).unique(return_inverse=True)
    parts = [
        reader.rows(name, start, min(start + ROWS, module.num_embeddings))[rows[here] - start].float()
        for start in range(0, module.num_embeddings, ROWS)
        if (here := (rows >= start) & (rows < start + ROWS)).any()
    ]
    table = torch.cat(parts)[place]
    check_finite({name: table})
    tensors = reader.read(f"{path}.{part}.weight" for part in PARTS)
    check_finite(tensors)
    embedded = layerwise.embed(ids[None])[0, :, : layerwise.source.config.hidden_size]
    table, found = table * float(module.embed_scale), []
    first, second = (getattr(decoder, part) for part in PARTS)
    weights = [{"weight": tensors[f"{path}.{part}.weight"]} for part in PARTS]
    with layerwise.filled(first, weights[0]), layerwise.filled(second, weights[1]):
        for states, rows in zip(embedded.split(ROWS), table.split(ROWS), strict=True):
            rows = rows.unflatten(-1, (-1, layerwise.input_width)).to(layerwise.device)
            inputs = decoder.project_per_layer_inputs(states[None].to(layerwise.device), rows[None])[0]
            found.append(inputs.float().cpu())
    return torch.cat(found)
