"""The frontier of cache size and quality of a model: converts it at several sizes and measures each one.

Every point is a conversion of its own. It is measured on the evaluation text, which is reported, and on a held-out text, by
which a size is chosen: on the text that it was chosen by, a size looks better than it is. sweep.json holds the finished
points and is written after every point, so that the same sweep, run again, continues from there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mla_convert.core import runtime as environment
from mla_convert.core.errors import GateFailed, InputError, MlaConvertError, UsageError
from mla_convert.core.files import staged
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import PAGE, REPORT, find_content, read_report
from mla_convert.core.report_schema import JsonObject, OriginalCacheSection, SweepEntry
from mla_convert.core.settings import ConvertConfig
from mla_convert.core.words import expanded
from mla_convert.pipeline.convert import convert
from mla_convert.pipeline.resolve import ResolvedConversion, resolve
from mla_convert.pipeline.sweep_file import SWEEP, SweepFile, SweepPoint, digest
from mla_convert.publish.engines import target_engine
from mla_convert.publish.engines.export import export as export_folder
from mla_convert.publish.engines.profiles import Profile, check_profile
from mla_convert.report.html.page import page_text
from mla_convert.source import mixture
from mla_convert.source.source import Source, open_source
from mla_convert.source.texts import FROM_CALIB, NONE
from mla_convert.write.revise import replace_files
from mla_convert.write.writer import check_output

WORK = ".work"  # folder of conversions that are not kept
RATIOS = (0.67, 0.5, 0.33, 0.25)


@dataclass(frozen=True)
class Grid:
    """The points of a sweep: every fraction of the cache with every number of rotary dims and every seed."""

    kv_ratios: tuple[float, ...] = RATIOS
    rope_dims: tuple[int | str | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)

    def configs(self, config: ConvertConfig, folder: Path) -> Iterator[ConvertConfig]:
        """One configuration per point, in order; each writes a folder of its own in `folder`."""
        for ratio in self.kv_ratios:
            for rope_dim in self.rope_dims:
                for seed in self.seeds:
                    name = f"kv-{ratio}" + (f"-rope-{rope_dim}" if rope_dim is not None else "")
                    name += f"-seed-{seed}" if len(self.seeds) > 1 else ""
                    size = {"kv_ratio": ratio, "rank": None, "rope_dim": rope_dim, "seed": seed}
                    yield config.model_copy(update={**size, "out": folder / name, "overwrite": False})


@dataclass(frozen=True)
class PlannedPoint:
    """A point to convert: its configuration, its resolution and the identity that a finished point is recognised by."""

    config: ConvertConfig
    resolved: ResolvedConversion
    identity: str

    @property
    def out(self) -> Path:
        """Folder that the conversion writes."""
        assert self.config.out is not None
        return self.config.out


def sweep(
    config: ConvertConfig,
    grid: Grid,
    folder: Path,
    *,
    keep: bool = False,
    max_ppl_ratio: float | None = None,
    export: str | None = None,
    progress: Progress | None = None,
) -> JsonObject:
    """Convert and measure every point of a grid; returns the content of sweep.json, which is written to `folder`.

    Args:
        config: The settings that all points share; the chosen conversion is written to `config.out`, if it is given.
        grid: The points.
        folder: Where sweep.json and its page are written.
        keep: Leave all conversions in `folder`.
        max_ppl_ratio: Choose the smallest cache whose ratio on the held-out text is at most this.
        export: Profile in which the chosen conversion is exported beside `config.out`, or every point in `folder` where
            that is not given.
        progress: Where progress is shown; by default on stderr.

    Raises:
        UsageError: There is no evaluation to compare, or the export is not possible.
        InputError: A folder, source or size that cannot be used; all sizes are checked before the first conversion.
        GateFailed: No point is good enough; all are in sweep.json.
        MlaConvertError: Any error of a conversion; finished points stay in sweep.json.
    """
    progress = progress or Progress()
    if config.eval == NONE:
        raise UsageError(f"a sweep is a comparison of evaluations: --eval {NONE} leaves nothing to compare")
    profile = None if export is None else check_profile(export)
    config = config.model_copy(update={"held_out": config.held_out or FROM_CALIB})
    if profile:
        config = target_engine.with_export_defaults(config, profile)
    source = open_source(config.source, config.revision, weights=False)
    _check_folder(folder)
    if config.out:
        check_output(config.out, source.folder, config.overwrite)
    planned = plan_points(list(grid.configs(config, folder if keep else folder / WORK)), source, progress)
    if profile:
        for point in planned:
            target_engine.check_export(point.resolved.settings, point.resolved.plan, profile, source)
    run = SweepRun(planned, SweepFile(folder, max_ppl_ratio), keep, None if config.out else profile, progress)
    try:
        for number, point in enumerate(planned):
            progress.note(f"point {number + 1} of {len(planned)}: {point.out.name}")
            run.add(number)
    except (MlaConvertError, KeyboardInterrupt) as error:
        if done := run.done:
            kept = f"{len(done)} of {len(planned)} points are in {folder / SWEEP}, and the same command continues from there"
            error.args = ("; ".join([*map(str, error.args), kept]),)
        raise
    try:
        if max_ppl_ratio is not None:
            run.choose(config.out)
        if config.out and profile:
            export_folder(config.out, target_engine.default_export(config.out, profile), profile, overwrite=True,
                          progress=progress)  # fmt: skip
    finally:
        run.clear()
    return run.content


def plan_points(configs: list[ConvertConfig], source: Source, progress: Progress) -> list[PlannedPoint]:
    """Resolve every point of a sweep.

    An engine has a few sizes, so that several fractions of the cache may lead to the same one, and some to none: such points
    are left out, with a note.

    Raises:
        InputError: A size that the model cannot have; with an engine only where no point is left.
        UsageError: A setting that the engine cannot serve.
        ResourceError: There is no such device.
    """
    points: dict[tuple[int, int, int], PlannedPoint] = {}
    notes, refused = [], []
    for config in configs:
        assert config.out is not None
        if points:  # the original is the same at every size: the first point measures its quantised caches for all
            config = config.model_copy(update={"original_cache": None})
        try:
            resolved = resolve(config, source)
        except InputError as error:
            if config.engine is None:
                raise
            refused.append(error)
            notes.append(f"{config.out.name} is left out: {error}")
            continue
        size = (resolved.plan.rank, resolved.plan.rope_dim, config.seed)
        if config.engine and size in points:
            notes.append(
                f"{config.out.name} is left out: for {config.engine} its sizes are those of {points[size].out.name}"
            )
            continue
        # Without an engine every point counts, also two of one size.
        key = size if config.engine else (len(points), 0, 0)
        points[key] = PlannedPoint(config, resolved, _identity(resolved))
    if not points:
        raise refused[0]
    for note in notes:
        progress.note(note)
    return list(points.values())


class SweepRun:
    """The points of a sweep while it runs: converted one after another, in memory and in sweep.json.

    Args:
        planned: The points.
        file: sweep.json; points that it holds already are not converted again.
        keep: Leave all conversions in the folder.
        profile: Profile in which every point is exported, or None.
        progress: Where progress is shown.
    """

    def __init__(
        self, planned: list[PlannedPoint], file: SweepFile, keep: bool, profile: Profile | None, progress: Progress
    ):
        """Take over the points that an earlier run has finished."""
        self._planned, self._file, self._keep, self._profile, self._progress = planned, file, keep, profile, progress
        finished = file.read()
        self._points = [finished.get(point.identity) for point in planned]
        self._chosen: SweepPoint | None = None

    @property
    def done(self) -> list[SweepPoint]:
        """The finished points, in order."""
        return [point for point in self._points if point]

    @property
    def content(self) -> JsonObject:
        """The content of sweep.json."""
        return self._file.content(self.done, self._chosen)

    def add(self, number: int) -> None:
        """Convert one point, unless that is done already, and record it."""
        planned = self._planned[number]
        exported = self._file.folder / f"{planned.out.name}-{self._profile}"
        converted = self._converted(number)
        # With --keep a point is done only if its folder is there; else its entry in sweep.json suffices.
        measured = converted == planned.out if self._keep else self._points[number] is not None
        to_export = self._profile is not None and not (measured and exported.exists())
        if measured and (converted or not to_export):
            self._progress.note(f"{planned.out.name} is in {self._file.folder / SWEEP} already")
        else:
            converted = self._convert(number)
        self._file.write(self.done, self._chosen)
        if self._profile and converted and to_export:
            export_folder(converted, exported, self._profile, overwrite=True, progress=self._progress)
        if not self._keep:
            # Only the candidate so far is kept, so that the disk holds two conversions at most.
            for other in range(len(self._planned)):
                if other != self._best():
                    shutil.rmtree(self._planned[other].out, ignore_errors=True)

    def choose(self, out: Path | None) -> None:
        """Choose the smallest point that is good enough, and write its conversion to `out`.

        Args:
            out: Folder to write; None writes nothing.

        Raises:
            GateFailed: No point is good enough.
        """
        number = self._best()
        self._chosen = None if number is None else self._points[number]
        self._file.write(self.done, self._chosen)
        if number is None or self._chosen is None:
            least = min(point.held_out_ratio for point in self.done)
            limit = self._file.limit
            raise GateFailed(
                f"no point has a perplexity ratio of at most {limit:g} on the held-out text: the best has ×{least:.4f}"
            )
        if out is None:
            return
        converted = self._converted(number)
        if converted is None:  # an earlier run measured it and did not keep it
            self._progress.note(f"{self._chosen.name} is converted again, to be written")
            converted = self._convert(number)
        _publish(converted, out, self.done)

    def clear(self) -> None:
        """Delete the conversions that are not kept."""
        shutil.rmtree(self._file.folder / WORK, ignore_errors=True)

    def _converted(self, number: int) -> Path | None:
        """The folder of a finished point's conversion, of this run or kept by an earlier one; None if there is none."""
        point, out = self._points[number], self._planned[number].out
        if point is None:
            return None
        # Conversions lie in different folders with --keep and without it.
        for folder in (out, self._file.folder / out.name):
            checksums = find_content(folder).get("checksums")
            # A folder of that name may hold another run's conversion; its weights tell.
            if checksums and digest(checksums) == point.weights:
                return folder
        return None

    def _best(self) -> int | None:
        """Of the points within the limit on the held-out text the smallest; of equally small ones the best."""
        # Without a limit there is no choice, and no conversion to keep.
        limit = -math.inf if self._file.limit is None else self._file.limit
        good = [(p.numbers, p.held_out_ratio, i) for i, p in enumerate(self._points) if p and p.held_out_ratio <= limit]
        return min(good)[2] if good else None

    def _convert(self, number: int) -> Path:
        """Convert one point and return its folder."""
        planned = self._planned[number]
        report = convert(planned.config, self._progress)
        self._points[number] = SweepPoint.from_report(planned.out.name, planned.config, report, planned.identity)
        return planned.out


def _identity(resolved: ResolvedConversion) -> str:
    """A digest of everything that changes a point's result."""
    config, source = resolved.settings, resolved.source
    settings = config.model_dump(mode="json", exclude={"out", "overwrite"})
    # the revision of a Hub source identifies it, and its weights may not have been fetched yet
    weights = [source.name, source.revision] if source.revision else source.fingerprint()
    specs = [*(part.spec for part in mixture.parts(config.calib)), config.eval, config.held_out]
    texts = [_stamp(spec) for spec in specs]
    return digest([settings, weights, texts, environment.device_name(resolved.device), environment.versions()])


def _stamp(spec: str | None) -> list[int] | None:
    """Size and time of a text file, which change when the text does; None for any other text."""
    path = expanded(spec) if spec else None
    return [path.stat().st_size, path.stat().st_mtime_ns] if path and path.is_file() else None


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a sweep, whole or stopped at its first point."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder with --folder")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if SWEEP not in names and not all(name == WORK or name.startswith(("kv-", ".kv-")) for name in names):
        raise InputError(f"folder {folder} exists and holds no sweep: give another with --folder")


def _publish(folder: Path, out: Path, points: list[SweepPoint]) -> None:
    """Copy a finished conversion to `out`, with the frontier in its report. The name appears when all files are there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}.draft"
    with staged(draft, out):
        shutil.copytree(folder, draft)
        report = read_report(draft)
        report.sweep = [_entry(point) for point in points]
        if caches := next((point.original_cache for point in points if point.original_cache), None):
            report.original_cache = OriginalCacheSection.model_validate(caches)
        replace_files(draft, {REPORT: report.text(), PAGE: page_text(report)})


def _entry(point: SweepPoint) -> SweepEntry:
    """A point in the report of the chosen conversion."""
    more = {"kl": point.evaluation.get("kl"), "latent_cache": point.latent_cache}
    return SweepEntry(numbers=point.numbers, share=point.share, ratio=point.ratio, stderr=point.stderr,
                      **{name: value for name, value in more.items() if value})  # fmt: skip
