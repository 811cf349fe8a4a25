"""Formats of the latent cache in closed form: many sizes, bits and bases of one model in one pass over its layers.

    python benchmarks/cache_formats.py MODEL --calib train.txt.gz --eval test.txt.gz 160+32 224+96:int4 256+128:mixed:wide=160

A format is RANK+ROPE, the same in every layer, then words after colons: a kind (fp8, int8, int4 or mixed; none is bfloat16),
group=N (0: one scale; default 64, fp8: 0, rope=int4: 48), rope=bf16|fp8|int8|int4 (default fp8), wide=N for mixed, a basis
(spread, scaled or pca), and nope=N for heads with N content dims. No gradient step is taken: the table compares formats, and
refinement lowers every one of its figures. Statistics are those of the source's hidden states. Shares count bytes of packed
rows against the source's cache in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from mla_convert.core import runtime
from mla_convert.core.settings import ConvertConfig
from mla_convert.evaluate.quality import perplexity as measure
from mla_convert.method.calibrate.attention_forward import attention_kwargs
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel, first_output
from mla_convert.method.calibrate.statistics import layer_statistics
from mla_convert.method.factorise.basis import in_basis
from mla_convert.method.factorise.layer import build_attention, factorise_layer, fill_attention, mla_config
from mla_convert.method.factorise.sizes import GROUP, JOINT_GROUP, CacheFormat, LayerSize, Plan
from mla_convert.modeling.latent_format_mla import KINDS
from mla_convert.pipeline import streamed
from mla_convert.pipeline.streams import open_streams
from mla_convert.source import texts
from mla_convert.source.shape import AttentionShape
from mla_convert.source.source import open_source

BASES = ("spread", "scaled", "pca")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A format to measure, by its name on the command line."""

    name: str
    plan: Plan
    basis: str

    @classmethod
    def parse(cls, name: str, shape: AttentionShape) -> Candidate:
        """Read a format.

        Raises:
            ValueError: it is none.
        """
        size, *words = name.split(":")
        rank, rope_dim = map(int, size.split("+"))
        kind = next((word for word in words if word in KINDS), "bf16")
        basis = next((word for word in words if word in BASES), "spread")
        options = dict(word.split("=") for word in words if word not in (kind, basis))
        rope = options.pop("rope", "bf16" if kind == "bf16" else "fp8")
        default = 0 if kind in ("fp8", "bf16") else JOINT_GROUP if rope == "int4" else GROUP
        cache = CacheFormat(kind, int(options.pop("group", default)), rope)
        wide, nope_dim = int(options.pop("wide", 0)), int(options.pop("nope", 0)) or None
        if options:
            raise ValueError(f"{name}: unknown {', '.join(options)}")
        each = LayerSize(min(rank, cache.possible(shape.full_rank(rope_dim))), rope_dim, wide)
        plan = Plan(each.rank, rope_dim, shape, (each,) * shape.layers, cache, wide, nope_dim=nope_dim)
        return cls(name, plan, basis)


class Formats:
    """Carries the hidden states of every candidate, and the source's, through the layers."""

    def __init__(self, args: argparse.Namespace):
        """Open the model and its texts."""
        device = runtime.pick_device(args.device)
        config = ConvertConfig(
            source=args.source, calib=args.calib, calib_samples=args.calib_samples, calib_length=args.calib_length,
            calib_noise=0, eval=args.eval, eval_windows=args.eval_windows, eval_length=args.eval_length,
        )  # fmt: skip
        self.source, self.selection = open_source(config.source), args.rope_selection
        self.layerwise = LayerwiseModel(self.source, device)
        reach = texts.reach(self.source.config, learned=not self.source.family.rotary)
        tokenizer, hidden = self.source.tokenizer(), self.source.shape.hidden_size
        self.windows = texts.load_windows(config, tokenizer, device.type == "cuda", reach, hidden)
        self.streams = open_streams(self.layerwise, self.windows.calib, self.windows.measured, None)
        self.candidates = [Candidate.parse(name, self.source.shape) for name in dict.fromkeys(args.formats)]
        self.states = {each.name: self.streams.eval_original.clone() for each in self.candidates}
        # Of each layer, the share of the content logits' energy that narrower heads keep.
        self.kept: dict[str, list[float]] = {each.name: [] for each in self.candidates}

    @torch.no_grad()
    def run(self) -> None:
        """Carry all states through all layers."""
        lengths = {states.length for states in self.streams.original}
        kwargs = {length: self.layerwise.layer_kwargs(length) for length in lengths}
        eager = attention_kwargs(self.layerwise, self.streams.calib_original.length)
        for index in range(self.source.shape.layers):
            with self.layerwise.layer(index, self.layerwise.layer_tensors(index)) as layer:
                own = {length: kwargs[length][index] for length in lengths}
                self._candidates(index, layer, own, eager[index])
                for states in self.streams.original:
                    self._advance(states, layer, own)
            print(f"layer {index + 1}/{self.source.shape.layers}", file=sys.stderr, flush=True)

    def _candidates(self, index: int, layer: torch.nn.Module, kwargs: dict, eager: dict) -> None:
        name, stride = self.source.family.attention, self.source.family.freq_stride
        attention, rotation = getattr(layer, name), self.layerwise.rotation(index, eager)
        statistics, factorised = None, {}
        for each in self.candidates:
            size = each.plan.layer(index)
            student = build_attention(
                mla_config(self.source, each.plan, torch.float32), attention, self.layerwise.device
            )
            if statistics is None:
                statistics = layer_statistics(self.layerwise, layer, self.streams.calib_original, eager, student)
            key = size.rank, size.rope_dim, each.plan.most_nope_dim(index)
            if key not in factorised:
                *sizes, nope_dim = key
                factorised[key] = factorise_layer(
                    self.source, attention, statistics, *sizes, self.selection, rotation, nope_dim
                )
            self.kept[each.name].append(factorised[key].energy.get("nope_kept", 1.0))
            fill_attention(student, in_basis(factorised[key], each.plan.cache.row(size), each.basis), stride)
            setattr(layer, name, student)
            self._advance(self.states[each.name], layer, kwargs)
            setattr(layer, name, attention)

    def _advance(self, states: Activations, layer: torch.nn.Module, kwargs: dict) -> None:
        with self.layerwise.autocast():
            states.advance(lambda hidden: first_output(layer(hidden, **kwargs[hidden.shape[1]])))

    def rows(self) -> list[dict]:
        """Share of the bytes, perplexity ratio, KL and agreement of every candidate."""
        rows = []
        for each in self.candidates:
            original, states = self.streams.eval_original.data, self.states[each.name].data
            scores = streamed.scores(self.layerwise, self.windows.measured, original, states)
            found = measure.perplexity_section(self.windows, scores)
            rows.append({
                "format": each.name, "share": each.plan.cache_ratio, "ratio": found.ratio, "kl": found.kl.value,
                "kl_error": found.kl.error, "agreement": found.agreement.value,
                "nope_kept": self.kept[each.name],
            })  # fmt: skip
        return rows


def main() -> None:
    """Measure, print a table in Markdown, and save it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("formats", nargs="+")
    parser.add_argument("--calib")
    parser.add_argument("--eval")
    parser.add_argument("--calib-samples", type=int, default=32)
    parser.add_argument("--calib-length", type=int, default=1024)
    parser.add_argument("--eval-windows", type=int, default=12)
    parser.add_argument("--eval-length", type=int, default=2048)
    parser.add_argument("--rope-selection", default="by_loss", help="as for convert")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", type=Path, help="write the rows to this JSON file")
    args = parser.parse_args()
    formats = Formats(args)
    with runtime.deterministic(0):
        formats.run()
    rows = formats.rows()
    print("| format | bytes | perplexity ratio | KL | next-token agreement |\n|---|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['format']} | {row['share']:.1%} | {row['ratio']:.4f} | {row['kl']:.4f} | {row['agreement']:.3f} |"
        )
    if args.save:
        args.save.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
