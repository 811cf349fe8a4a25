"""Write the tables of the documentation from the CSV files in benchmarks/results.

python scripts/make_results_tables.py            # rewrite every table
python scripts/make_results_tables.py --check    # exit code 1 if a page differs from its CSV files

A page names a table by `<!-- table NAME.csv -->` and ends it by `<!-- /table -->`. `<!-- table NAME.csv: A | B -->` takes the
columns A and B only and leaves out the caption. Lines of a CSV file that begin with `#` hold `key: value` for the caption: model,
text, machine, version (the commit that recorded the figures) and command (how to repeat the measurement).
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table (?P<name>[\w.-]+\.csv)(?:: (?P<columns>.+?))? -->\n).*?(<!-- /table -->)", re.DOTALL)
CAPTION = ("model", "text", "machine", "version")
# A column of these is aligned right: numbers with a sign, a unit or a share, dashes and empty cells.
NUMERIC = re.compile(r"[−×±-]?[\d.,]+(?:[%kM×]| \(\d+%\))?|–|")


def read_results(path: Path) -> tuple[dict[str, str], list[str], list[dict[str, str]]]:
    """Read one results file.

    Args:
        path: A CSV file whose first lines may be `# key: value`.

    Returns:
        The facts for the caption, the column names, and one dictionary a row.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
    return facts, list(rows[0]), rows


def caption(facts: dict[str, str]) -> str:
    """Conditions of a measurement as one paragraph and, if one is recorded, the command that repeats it."""
    words = " ".join(f"{name.capitalize()}: {facts[name]}." for name in CAPTION if name in facts)
    command = f"\n\n```sh\n{facts['command']}\n```" if "command" in facts else ""
    # A fact may end with a full stop of its own.
    return f"*{words}*{command}\n".replace("..*", ".*")


def markdown(path: Path, wanted: str | None) -> str:
    """One results file as a Markdown table, with its caption unless single columns are asked for."""
    facts, columns, rows = read_results(path)
    if wanted:
        columns = [column.strip() for column in wanted.split("|")]
    numeric = [all(NUMERIC.fullmatch(row[column]) for row in rows) for column in columns]
    lines = [columns, ["---:" if number else "---" for number in numeric], *([row[c] for c in columns] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table if wanted else f"\n{table}\n{caption(facts)}\n"


def with_tables(page: str) -> str:
    """The text of a page with every marked table made anew."""
    return TABLE.sub(lambda match: match[1] + markdown(RESULTS / match["name"], match["columns"]) + match[4], page)


def main() -> None:
    """Rewrite the pages, or check them."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"not made from benchmarks/results: {', '.join(stale)}; run python scripts/make_results_tables.py")


if __name__ == "__main__":
    main()
