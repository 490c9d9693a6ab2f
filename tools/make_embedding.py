"""Write the generated tables of docs/embedding.md: `python tools/make_embedding.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import host_models  # noqa: E402
import operator_habits  # noqa: E402

DOCS = ROOT / "docs" / "embedding.md"


def with_tables(text: str) -> str:
    """The page with its tables made again."""
    for name, table in (("habits", operator_habits.table()), ("models", host_models.table())):
        mark = f"<!-- {name}: made by tools/make_embedding.py -->"
        text, count = re.subn(
            f"{re.escape(mark)}.*?<!-- end -->", lambda _, t=table, m=mark: f"{m}\n{t}\n<!-- end -->", text, flags=re.S
        )
        if count != 1:
            raise ValueError(f"{DOCS.name} has {count} places for the table {name}; expected 1")
    return text


def main() -> None:
    DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
