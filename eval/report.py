"""One self-contained HTML page: tables and pictures, no network, no scripts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

__all__ = ["Page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .9rem .25rem 0 }
th, td { text-align: left; vertical-align: top }
td { white-space: nowrap }
img { max-width: 100%; border: 1px solid #eee }
"""


@dataclass
class Page:
    """A page that grows from top to bottom.

    Args:
        title: Heading and window title.
    """

    title: str
    _parts: list[str] = field(default_factory=list)

    def text(self, words: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(words)}</p>")

    def heading(self, words: str) -> None:
        """Add a section heading."""
        self._parts.append(f"<h2>{html.escape(words)}</h2>")

    def table(self, rows: Sequence[Mapping[str, object]], folded: str = "") -> None:
        """Add a table; the keys of the first row are its head.

        Args:
            rows: At least one.
            folded: Words to click on before it shows; empty for a table in plain sight.
        """
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) + "</tr>"
            for row in rows
        )
        table = f"<table><tr>{head}</tr>{body}</table>"
        if folded:
            table = f"<details><summary>{html.escape(folded)}</summary>{table}</details>"
        self._parts.append(table)

    def image(self, image: Image.Image, alt: str) -> None:
        """Add a picture, embedded as PNG."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        self._parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')

    def write(self, path: Path) -> None:
        """Write the page to a file."""
        title = html.escape(self.title)
        path.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style><h1>{title}</h1>{''.join(self._parts)}</html>\n"
        )
