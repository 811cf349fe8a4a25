"""sweep.json: the finished points of a sweep, their file and the table that shows them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mla_convert.core import runtime as environment
from mla_convert.core.report_file import find_content
from mla_convert.core.report_schema import Comparison, JsonObject, Report, SweepReport, to_json
from mla_convert.core.settings import ConvertConfig
from mla_convert.report import format, frontier
from mla_convert.report.html.page import write_sweep_page

SWEEP = "sweep.json"
SWEEP_PAGE = "sweep.html"
SCHEMA = 1


@dataclass(frozen=True)
class SweepPoint:
    """A finished point, as sweep.json holds it. NaN and infinity are None."""

    name: str
    kv_ratio: float | None
    seed: int
    rank: float
    rope_dim: float
    numbers: float
    share: float
    ratio: float | None
    stderr: float | None
    evaluation: JsonObject
    held_out: JsonObject
    calibration: JsonObject
    seconds: float
    device: str
    source: str
    settings: JsonObject
    weights: str
    identity: str
    latent_cache: JsonObject | None = None
    original_cache: JsonObject | None = None

    @classmethod
    def from_report(cls, name: str, config: ConvertConfig, report: Report, identity: str) -> SweepPoint:
        """The point that a conversion has finished.

        Args:
            name: Its name, that of its folder.
            config: Its configuration.
            report: Its report.
            identity: A digest of everything that changes its result.
        """
        content = report.as_dict()
        evaluation, cache = content["evaluation"], report.cache
        held_out = evaluation.pop("held_out")
        return cls(
            name=name,
            kv_ratio=config.kv_ratio,
            seed=config.seed,
            rank=cache.kv_lora_rank,
            rope_dim=cache.qk_rope_head_dim,
            numbers=cache.numbers_per_token_per_layer.after,
            share=1 - cache.share_saved,
            ratio=evaluation["ratio"],
            stderr=to_json(report.measured.ratio_error),
            evaluation=evaluation,
            held_out=held_out,
            calibration=content["calibration"],
            seconds=report.seconds,
            device=report.device,
            source=report.source.name,
            settings=content["settings"],
            weights=digest(report.checksums),
            identity=identity,
            latent_cache=cache.latent_cache,
            original_cache=content.get("original_cache"),
        )

    @classmethod
    def read(cls, entry: Any) -> SweepPoint | None:
        """The point of an entry of sweep.json; None if the entry is not whole."""
        names = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        # Fields of later versions are ignored, and an entry of an earlier one that lacks a field is converted again.
        whole = isinstance(entry, dict) and needed <= entry.keys()
        return cls(**{name: entry[name] for name in names & entry.keys()}) if whole else None

    @property
    def held_out_ratio(self) -> float:
        """Ratio of perplexity to the original's on the held-out text."""
        ratio = self.held_out["ratio"]
        return math.inf if ratio is None else ratio


@dataclass(frozen=True)
class SweepFile:
    """sweep.json in a folder, and the page that shows it."""

    folder: Path
    limit: float | None

    def read(self) -> dict[str, SweepPoint]:
        """The finished points by identity."""
        points = map(SweepPoint.read, find_content(self.folder / SWEEP).get("points", []))
        return {point.identity: point for point in points if point}

    def content(self, points: list[SweepPoint], chosen: SweepPoint | None) -> JsonObject:
        """The content of sweep.json."""
        return to_json({"schema": SCHEMA, "source": points[0].source, "versions": environment.versions(),
                       "max_ppl_ratio": self.limit, "chosen": chosen and chosen.name,
                       "points": [asdict(point) for point in points]})  # fmt: skip

    def write(self, points: list[SweepPoint], chosen: SweepPoint | None) -> None:
        """Replace sweep.json and its page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = self.content(points, chosen)
        # A kill leaves the old file or the new one, never a part of one.
        draft = self.folder / f".{SWEEP}.partial"
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / SWEEP)
        write_sweep_page(content, self.folder / SWEEP_PAGE)


def digest(content: Any) -> str:
    """SHA-256 of JSON-like data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def print_sweep(content: JsonObject, console: Console) -> None:
    """Print the table of a sweep, and the chosen point."""
    points = content["points"]
    before = points[0]["evaluation"]["before"]["value"]
    seeds = len({entry["seed"] for entry in points}) > 1
    title = f"{content['source']}: perplexity {before:.3f} before conversion" if before else content["source"]
    table = Table(title=title, title_justify="left")
    for column in (
        "share",
        "numbers",
        "rank + rotary",
        *(["seed"] if seeds else []),
        "perplexity",
        "ratio",
        "held out",
        "s",
    ):
        table.add_column(column, justify="right")
    for entry in points:
        after = entry["evaluation"]["after"]["value"]
        row = [f"{entry['share']:.1%}", f"{entry['numbers']:g}", f"{entry['rank']} + {entry['rope_dim']}"]
        row += [str(entry["seed"])] if seeds else []
        row += ["–" if after is None else f"{after:.3f}", _words(entry["evaluation"]), _words(entry["held_out"])]
        table.add_row(*row, f"{entry['seconds']:.0f}", style="bold" if entry["name"] == content["chosen"] else None)
    console.print(table)
    found = frontier.points_of_sweep(SweepReport.model_validate(content))
    if any(point.series == "original" for point in found):
        console.print(frontier.table(found, "quality at equal bytes").rich())
    evaluation, held_out = points[0]["evaluation"], points[0]["held_out"]
    lines = [
        f"perplexity and ratio to the original's on {evaluation['text']}: {evaluation['protocol']}",
        f"held out: the ratio on {held_out['text']}: {held_out['protocol']}",
        "± is one standard error over windows",
    ]
    for entry in points:
        if entry["name"] == content["chosen"]:
            lines.append(
                f"smallest cache within ×{content['max_ppl_ratio']:g} on the held-out text: {entry['share']:.1%}, "
                f"rank {entry['rank']} + {entry['rope_dim']} rotary"
            )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _words(evaluation: JsonObject) -> str:
    return format.ratio(Comparison.model_validate(evaluation))
