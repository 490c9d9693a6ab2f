"""The one template: a page is a title, a lead sentence and sections of already escaped HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; color: #1c2128; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: #57606a; margin-top: 0; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .35rem .7rem; }
th { color: #57606a; font-weight: 600; border-bottom: 2px solid #d0d7de; } td { border-bottom: 1px solid #eaeef2; }
td.good { color: #1a7f37; font-weight: 600; } pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem; }
.card { border: 1px solid #d0d7de; border-radius: 8px; padding: .7rem; overflow-wrap: anywhere; }
.card img { width: 100%; border-radius: 4px; } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
.card .task { color: #57606a; font-size: .85rem; } .card .right { color: #1a7f37; } .card .wrong { color: #cf222e; }
.card p { margin: .35rem 0; white-space: pre-wrap; }
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole document. `title` and `lead` are escaped here; section bodies must be HTML already."""
    body = "\n".join(f"<h2>{escape(heading)}</h2>\n{html}" for heading, html in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>\n{body}\n</body></html>\n'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], good: Sequence[bool] = ()) -> str:
    """An HTML table; cells are escaped. Where `good[i]`, row i's second cell is set in green."""
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    lines = []
    for number, row in enumerate(rows):
        green = number < len(good) and good[number]
        cells = [
            f"<td{' class=good' if green and i == 1 else ''}>{escape(str(cell))}</td>" for i, cell in enumerate(row)
        ]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def image_tag(image: Image.Image, alt: str, *, width: int = 448, quality: int = 85) -> str:
    """An <img> with the picture inside (JPEG, at most `width` pixels wide)."""
    picture = image.convert("RGB")
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'


def write(path: Path, html: str) -> None:
    """Write beside and rename, so that a page is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
