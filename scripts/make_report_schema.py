"""Writes docs/reference/report.schema.json, the JSON schema of report.json, from the types that read and write it.

python scripts/make_report_schema.py           # write it
python scripts/make_report_schema.py --check   # exit code 1 if it is not up to date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mla_convert.core.report_schema.json_schema import json_schema

FILE = Path(__file__).parents[1] / "docs" / "reference" / "report.schema.json"


def text() -> str:
    """The content of the file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def main() -> int:
    """Write or check the file."""
    if "--check" in sys.argv[1:]:
        return int(not FILE.is_file() or FILE.read_text(encoding="utf-8") != text())
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
