"""Quality of conversions of one model, at several cache sizes and with several settings, as one table.

    python benchmarks/quality.py MODEL --calib train.txt.gz --eval test.txt.gz --save results
    python benchmarks/quality.py MODEL --quick --budgets 0.5 --settings default uniform --add "more steps=--refine-steps 750"
    python benchmarks/quality.py demo --budgets 0.5 --eval-length 1024 --quick          # small enough for a CPU

Perplexity is exp of the mean negative log-likelihood of the evaluation text, tokenised as a whole, in non-overlapping windows
of 2048 tokens, the first 40 (4 with --quick), with logits in float32. ± is the standard error of the ratio over windows, paired.
Ratios compare only on the same windows. Memory is the highest peak of any phase: of the device, or of the host above the
interpreter with its libraries. Rank and rotary dimensions are means over layers where these differ.

Settings, besides those of --add:
    default             the defaults of a conversion
    uniform             the same sizes in every layer
    single layers       no blocks: every layer is refined alone
    residual only       the last block has no steps towards the next-token distribution
    no noise            calibration text without noise
    closed form         no gradient step
    even planes         the best plane of evenly spaced frequencies stays rotary, the others lose their rotation undamped;
                        closed form, no noise, the same sizes in every layer; the low rank is weighted by attention
    rope kept           upper reference, not a conversion: one latent for keys and values from which keys are restored before
                        they are rotated, so that RoPE loses nothing, and which cannot be absorbed (low_rank_reference.py)
    fp8 cache, int8 cache, int4 cache, int4 hadamard
                        not conversions: the original with a quantised cache, which is the alternative of a user; each at the
                        budget that it has (quantised_cache.py)

Every run is a process of its own, and its folder is deleted once it is measured. A run that fails has a row with the reason, and
the others continue. All further options are those of a conversion, for every run. With --save, FOLDER/quality.json and .md hold
all finished rows at any time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from mla_convert.core.report_schema import Comparison, to_json

CONVERT = [sys.executable, "-m", "mla_convert", "convert"]
SETTINGS = {
    "default": [],
    "uniform": ["--uniform"],
    "single layers": ["--refine-block", "1"],
    "residual only": ["--output-steps", "0"],
    "no noise": ["--calib-noise", "0"],
    "closed form": ["--refine-steps", "0"],
    "even planes": ["--rope-selection", "evenly_spaced", "--uniform", "--refine-steps", "0", "--calib-noise", "0"],
    "rope kept": [],
    "fp8 cache": ["--bits", "8"],
    "int8 cache": ["--bits", "8", "--group", "32"],
    "int4 cache": ["--bits", "4", "--group", "32"],
    "int4 hadamard": ["--bits", "4", "--group", "64", "--hadamard"],
}
# Settings that are no conversions: the script that runs them, and the budgets of those that have a fixed one.
SCRIPTS = {
    "rope kept": "low_rank_reference.py",
    **dict.fromkeys(("fp8 cache", "int8 cache", "int4 cache", "int4 hadamard"), "quantised_cache.py"),
}
# Bits over 16; with groups, also a scale and a zero point of 16 bits for each (`OriginalCacheFormat.bits_of`).
BUDGETS = {"fp8 cache": 0.5, "int8 cache": 0.5625, "int4 cache": 0.3125, "int4 hadamard": 0.28125}
COLUMNS = (
    "budget",
    "numbers",
    "rank",
    "rotary",
    "setting",
    "perplexity",
    "ratio",
    "±",
    "worst kind",
    "KL",
    "seconds",
    "peak memory",
)


def command(model: str, budget: float, setting: str, options: list[str], common: list[str], out: Path) -> list[str]:
    """The command of one cell of the table. The setting's options come after the common ones, so they have precedence."""
    script = SCRIPTS.get(setting)
    start = [sys.executable, str(Path(__file__).with_name(script))] if script else CONVERT
    return [*start, model, "--json", "--quiet", "--out", str(out), *common, *options, "--kv-ratio", str(budget)]


def measure(budget: float, setting: str, words: list[str], out: Path) -> dict:
    """One row: run, read the report, remove the folder."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    # Without the interpreter, whose path is that of this machine.
    row = {"budget": budget, "setting": setting, "command": shlex.join(words[1:])}
    if done.returncode:
        # a killed process (out of memory, most likely) has printed no reason
        killed = done.returncode < 0 or not done.stderr.strip()
        lines = [f"exit code {done.returncode}"] if killed else done.stderr.strip().splitlines()
        return {**row, "failed": lines[-1]}
    report = json.loads(done.stdout)
    cache, evaluation, phases = report["cache"], report["evaluation"], report["phases"].values()
    device = max(phase.get("peak_device_bytes", 0) for phase in phases)
    return {
        **row,
        "numbers": cache["numbers_per_token_per_layer"]["after"],
        "rank": cache["kv_lora_rank"],
        "rope_dim": cache["qk_rope_head_dim"],
        "original": evaluation["before"]["value"],
        "perplexity": evaluation["after"]["value"],
        "ratio": evaluation["ratio"],
        "stderr": to_json(Comparison.model_validate(evaluation).ratio_error),
        "suite": evaluation.get("suite"),
        "seconds": report["seconds"],
        "peak_bytes": device or max(phase["peak_host_bytes"] for phase in phases),
        "peak_of": "device" if device else "host",
        "text": evaluation["text"],
        "protocol": evaluation["protocol"],
        "calibration": report["calibration"]["protocol"],
        "device": report["device"],
        "versions": report["versions"],
    }


def line(row: dict) -> str:
    """A row in Markdown."""
    if "failed" in row:
        return f"| {row['budget']:g} | | | | {row['setting']} | failed: {row['failed'].replace('|', '/')} | | | | | | |"
    cells = [f"{row['budget']:g}", f"{row['numbers']:g}", f"{row['rank']:g}", f"{row['rope_dim']:g}", row["setting"],
             figure(row["perplexity"]), figure(row["ratio"], 4), figure(row["stderr"], 4),
             *worst(row["suite"]), f"{row['seconds']:.0f}",
             f"{row['peak_bytes'] / 1e9:.2f} GB ({row['peak_of']})"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def worst(suite: dict | None) -> tuple[str, str]:
    """The suite's worst kind of text, and the mean KL over kinds."""
    if not suite:
        return "–", "–"
    return f"{figure(suite['worst']['ratio'])} {suite['worst']['kind']}", figure(suite["kl"]["value"], 4)


def figure(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where it is None."""
    return "–" if value is None else f"{value:.{digits}f}"


def table(rows: list[dict]) -> str:
    """The rows in Markdown, and a sentence on their texts, device and versions."""
    head = [f"| {' | '.join(COLUMNS)} |", "|---:|---:|---:|---:|---|---:|---:|---:|---|---:|---:|---:|"]
    known = next((row for row in rows if "failed" not in row), None)
    about = []
    if known:
        about = ["", f"On {known['text']}: {known['protocol']}; the original's perplexity is {figure(known['original'])}. "
                 f"Calibrated on {known['calibration']}. {known['device']}, torch {known['versions']['torch']}."]  # fmt: skip
    return "\n".join([*head, *map(line, rows), *about]) + "\n"


def save(folder: Path | None, model: str, rows: list[dict]) -> None:
    """Write quality.json and quality.md with the rows so far."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"model": Path(model).name, "rows": rows}
        (folder / "quality.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "quality.md").write_text(table(rows), encoding="utf-8")


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and those that go to every conversion."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder, Hub id, .gguf file or recipe, as for a conversion")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.67, 0.5, 0.33, 0.25], help="shares of the cache")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="default: all of them")
    parser.add_argument(
        "--add", action="append", default=[], metavar="NAME=OPTIONS", help="another setting; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="the first 4 windows instead of the first 40")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, to share a GPU (default 1)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write quality.json and quality.md there")
    parser.add_argument(
        "--work", type=Path, help="folder for the conversions while they are measured (default: a temporary one)"
    )
    known, common = parser.parse_known_args()
    if known.jobs < 1 or any("=" not in words for words in known.add):
        parser.error("--jobs is at least 1, and --add is NAME=OPTIONS")
    return known, common


def main() -> int:
    """Run every setting at every budget; print and save rows as they come; 1 if any failed."""
    known, common = parse()
    settings = {name: SETTINGS[name] for name in known.settings}
    settings |= {name: shlex.split(words) for name, _, words in (added.partition("=") for added in known.add)}
    common = ["--eval-windows", "4" if known.quick else "40", "--eval-length", "2048", *common]
    rows: dict[tuple[float, str], dict] = {}
    cells = [(budget, name) for budget in known.budgets for name in settings if name not in BUDGETS]
    cells += [(BUDGETS[name], name) for name in settings if name in BUDGETS]
    print(table([]), end="", flush=True)
    with tempfile.TemporaryDirectory(dir=known.work) as folder, ThreadPoolExecutor(known.jobs) as pool:
        waiting = {}
        for number, (budget, name) in enumerate(cells):
            out = Path(folder) / str(number)
            words = command(known.model, budget, name, settings[name], common, out)
            waiting[pool.submit(measure, budget, name, words, out)] = (budget, name)
        try:
            for future in as_completed(waiting):
                rows[waiting[future]] = future.result()
                print(line(future.result()), flush=True)
                save(known.save, known.model, [rows[cell] for cell in cells if cell in rows])
        except BaseException:
            # Ctrl-C waits for the runs at work, not for the whole queue.
            pool.shutdown(cancel_futures=True)
            raise
    # The rows were printed as they came: the sentence behind the table is left.
    print("\n" + table([rows[cell] for cell in cells]).rpartition("|\n")[2].strip())
    return int(any("failed" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
