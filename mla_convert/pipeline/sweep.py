"""The quality–size frontier of a model: converts it at several sizes and measures each one.

Every point is a conversion of its own. It is measured on the evaluation text, which is what is reported, and on a held-out
text, by which a size is chosen: what was chosen on a text looks better there than it is. sweep.json holds what is finished
and is written after every point, so that the same sweep, run again, goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mla_convert.core import runtime as environment
from mla_convert.core.errors import GateFailed, InputError, MlaConvertError, UsageError
from mla_convert.core.files import publish
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import PAGE, REPORT, find_content, read_report
from mla_convert.core.report_schema import Comparison, JsonObject, SweepEntry, to_json
from mla_convert.core.settings import ConvertConfig
from mla_convert.core.words import expanded
from mla_convert.method.factorise.sizes import make_plan
from mla_convert.pipeline.convert import convert
from mla_convert.report import format
from mla_convert.report.html.page import page_text, write_sweep_page
from mla_convert.source import mixture
from mla_convert.source.source import Source, open_source
from mla_convert.source.texts import FROM_CALIB, NONE
from mla_convert.write.revise import replace_files
from mla_convert.write.writer import check_output

SWEEP, SWEEP_PAGE = "sweep.json", "sweep.html"
WORK = ".work"  # for conversions that are not kept
SCHEMA = 1
RATIOS = (0.67, 0.5, 0.33, 0.25)


@dataclass(frozen=True)
class Grid:
    """What is converted: every share of the cache with every number of rotary dims and every seed."""

    kv_ratios: tuple[float, ...] = RATIOS
    rope_dims: tuple[int | str | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)

    def configs(self, config: ConvertConfig, folder: Path) -> Iterator[ConvertConfig]:
        """One configuration a point, in order; each writes a folder of its own in `folder`."""
        for ratio in self.kv_ratios:
            for rope_dim in self.rope_dims:
                for seed in self.seeds:
                    name = f"kv-{ratio}" + (f"-rope-{rope_dim}" if rope_dim is not None else "")
                    name += f"-seed-{seed}" if len(self.seeds) > 1 else ""
                    size = {"kv_ratio": ratio, "rank": None, "rope_dim": rope_dim, "seed": seed}
                    yield config.model_copy(update={**size, "out": folder / name, "overwrite": False})


def sweep(
    config: ConvertConfig,
    grid: Grid,
    folder: Path,
    *,
    keep: bool = False,
    max_ppl_ratio: float | None = None,
    progress: Progress | None = None,
) -> JsonObject:
    """Convert and measure every point of a grid; returns the content of sweep.json, which is written to `folder`.

    With `max_ppl_ratio`, `chosen` is the smallest cache whose ratio on the held-out text is at most that, and where
    `config.out` is given too, that conversion is written there. `keep` leaves all conversions in `folder`.

    Raises:
        UsageError: without an evaluation there is nothing to draw.
        InputError: a folder, source or size that cannot be used; all sizes are looked at before the first conversion.
        GateFailed: no point is good enough; all are in sweep.json.
        MlaConvertError: whatever a conversion raises; finished points stay in sweep.json.
    """
    progress = progress or Progress()
    if config.eval == NONE:
        raise UsageError(f"a sweep is a comparison of evaluations: --eval {NONE} leaves nothing to compare")
    config = config.model_copy(update={"held_out": config.held_out or FROM_CALIB})
    source = open_source(config.source, config.revision, weights=False)
    _check_folder(folder)
    if config.out:
        check_output(config.out, source.folder, config.overwrite)
    wanted = list(grid.configs(config, folder if keep else folder / WORK))
    for point in wanted:
        make_plan(point, source.shape)
    points = _Points(wanted, source, folder, keep, max_ppl_ratio, progress)
    try:
        for number, point in enumerate(wanted):
            progress.note(f"point {number + 1} of {len(wanted)}: {point.out.name}")
            points.add(number)
    except (MlaConvertError, KeyboardInterrupt) as error:
        if done := points.done:
            kept = (
                f"{len(done)} of {len(wanted)} points are in {folder / SWEEP}, and the same command goes on from there"
            )
            error.args = ("; ".join([*map(str, error.args), kept]),)
        raise
    try:
        if max_ppl_ratio is not None:
            points.choose(config.out)
    finally:
        points.clear()
    return points.content


class _Points:
    """The finished points of a sweep, in memory and on disk."""

    def __init__(
        self,
        configs: list[ConvertConfig],
        source: Source,
        folder: Path,
        keep: bool,
        limit: float | None,
        progress: Progress,
    ):
        self._configs, self._folder, self._keep, self._limit = configs, folder, keep, limit
        self._progress = progress
        self._identities = [_identity(config, source) for config in configs]
        made = {entry.get("identity"): entry for entry in find_content(folder / SWEEP).get("points", [])}
        self._entries = [made.get(identity) for identity in self._identities]
        self._chosen: int | None = None

    @property
    def done(self) -> list[JsonObject]:
        """What is known of the points that are finished, in order."""
        return [entry for entry in self._entries if entry]

    @property
    def content(self) -> JsonObject:
        """As in sweep.json: NaN and infinity as null."""
        chosen = None if self._chosen is None else self._entries[self._chosen]["name"]
        return to_json({"schema": SCHEMA, "source": self.done[0]["source"], "versions": environment.versions(),
                       "max_ppl_ratio": self._limit, "chosen": chosen, "points": self.done})  # fmt: skip

    def add(self, number: int) -> None:
        """Convert one point, unless that is done already, and write down what was found."""
        config = self._configs[number]
        if self._entries[number] and (not self._keep or self._made(number) == config.out):
            self._progress.note(f"{config.out.name} is in {self._folder / SWEEP} already")
        else:
            self._convert(number)
        self._write()
        if not self._keep:
            for other in range(len(self._configs)):
                if other != self._best():
                    shutil.rmtree(self._configs[other].out, ignore_errors=True)

    def choose(self, out: Path | None) -> None:
        """Name the point that is small and good enough, and put its conversion to `out`.

        Raises:
            GateFailed: there is none.
        """
        self._chosen = self._best()
        self._write()
        if self._chosen is None:
            least = min(map(_held_out_ratio, self.done))
            raise GateFailed(
                f"no point has a perplexity ratio of at most {self._limit:g} on the held-out text: the best has ×{least:.4f}"
            )
        if out is not None:
            made = self._made(self._chosen)
            if made is None:  # an earlier run measured it and did not keep it
                self._progress.note(f"{self._entries[self._chosen]['name']} is converted again, to be written")
                self._convert(self._chosen)
                made = self._configs[self._chosen].out
            _publish(made, out, self.done)

    def clear(self) -> None:
        """Delete the conversions that are not kept."""
        shutil.rmtree(self._folder / WORK, ignore_errors=True)

    def _made(self, number: int) -> Path | None:
        """The folder of a finished point's conversion, of this run or one that was kept; None if it is gone."""
        entry, out = self._entries[number], self._configs[number].out
        for folder in (out, self._folder / out.name):
            checksums = find_content(folder).get("checksums")
            if checksums and _digest(checksums) == entry["weights"]:
                return folder
        return None

    def _best(self) -> int | None:
        """Of the points within the limit on the held-out text the smallest; of equal ones the best."""
        limit = -math.inf if self._limit is None else self._limit
        good = [i for i, entry in enumerate(self._entries) if entry and _held_out_ratio(entry) <= limit]
        return min(good, key=lambda i: (self._entries[i]["numbers"], _held_out_ratio(self._entries[i])), default=None)

    def _convert(self, number: int) -> None:
        config = self._configs[number]
        report = convert(config, self._progress)
        content = report.as_dict()
        evaluation = content["evaluation"]
        held_out = evaluation.pop("held_out")
        self._entries[number] = {
            "name": config.out.name,
            "kv_ratio": config.kv_ratio,
            "seed": config.seed,
            "rank": report.cache.kv_lora_rank,
            "rope_dim": report.cache.qk_rope_head_dim,
            "numbers": report.cache.numbers_per_token_per_layer.after,
            "share": 1 - report.cache.share_saved,
            "ratio": evaluation["ratio"],
            "stderr": to_json(report.measured.ratio_error),
            "evaluation": evaluation,
            "held_out": held_out,
            "calibration": content["calibration"],
            "seconds": report.seconds,
            "device": report.device,
            "source": report.source.name,
            "settings": content["settings"],
            "weights": _digest(report.checksums),
            "identity": self._identities[number],
        }

    def _write(self) -> None:
        """sweep.json, replaced whole, and its page."""
        self._folder.mkdir(parents=True, exist_ok=True)
        content = self.content
        draft = self._folder / f".{SWEEP}.partial"
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, self._folder / SWEEP)
        write_sweep_page(content, self._folder / SWEEP_PAGE)


def _identity(config: ConvertConfig, source: Source) -> str:
    """What changes when a point would come out different."""
    settings = config.model_dump(mode="json", exclude={"out", "overwrite"})
    # of a Hub source the revision says it all, and its weights may not have been fetched yet
    weights = [source.name, source.revision] if source.revision else source.fingerprint()
    specs = [*(part.spec for part in mixture.parts(config.calib)), config.eval, config.held_out]
    texts = [_stamp(spec) for spec in specs]
    device = environment.device_name(environment.pick_device(config.device))
    whole = [settings, weights, texts, device, environment.versions()]
    return _digest(whole)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stamp(spec: str | None) -> list[int] | None:
    """What changes when a text file does."""
    path = expanded(spec) if spec else None
    return [path.stat().st_size, path.stat().st_mtime_ns] if path and path.is_file() else None


def _held_out_ratio(entry: JsonObject) -> float:
    ratio = entry["held_out"]["ratio"]
    return math.inf if ratio is None else ratio


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a sweep, whole or stopped at its first point."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder with --folder")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if SWEEP not in names and not all(name == WORK or name.startswith(("kv-", ".kv-")) for name in names):
        raise InputError(f"folder {folder} exists and holds no sweep: give another with --folder")


def _publish(made: Path, out: Path, points: list[JsonObject]) -> None:
    """A finished conversion, with the frontier in its report, under a name that it gets only when all of it is there."""
    draft = out.parent / f".{out.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, draft)
        report = read_report(draft)
        report.sweep = [
            SweepEntry(**{key: entry[key] for key in ("numbers", "share", "ratio", "stderr")}) for entry in points
        ]
        replace_files(draft, {REPORT: report.text(), PAGE: page_text(report)})
        publish(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def print_sweep(content: JsonObject, console: Console) -> None:
    """The table at the end of a sweep, and which point was chosen."""
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
