"""The HTML of the report: the page, its style sheet, and the pieces that it is made of.

All text is escaped here; pictures are inlined; nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from patchflow.figures import Drawing
from patchflow.table import Table


def page_html(title: str, sections: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: The title, plain text.
        sections: HTML, from top to bottom.
    """
    return _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(sections))


def header_html(title: str, summary: str, notes: Sequence[str]) -> str:
    """The head of the page.

    Args:
        title: The heading.
        summary: A sentence below it, or empty.
        notes: Warnings and remarks.
    """
    summary = f"<p class=summary>{_text(summary)}</p>" if summary else ""
    lines = "".join(f"<p class=note>{_text(note)}</p>" for note in notes)
    return f"<header><h1>{_text(title)}</h1>{summary}{lines}</header>"


def section_html(title: str, body: str, remark: str = "") -> str:
    """A section, or nothing where its body is empty.

    Args:
        title: The heading.
        body: HTML.
        remark: Plain text above the body.
    """
    if not body:
        return ""
    remark = f"<p class=remark>{_text(remark)}</p>" if remark else ""
    return f"<section><h2>{_text(title)}</h2>{remark}{body}</section>"


def grid_html(figures: Sequence[str], style: str = "") -> str:
    """Figures side by side, as many as the screen is wide for.

    Args:
        figures: HTML, one each.
        style: A further class of the style sheet.
    """
    return f'<div class="grid {style}">{"".join(figures)}</div>' if figures else ""


def table_html(table: Table) -> str:
    """A table of results; the best figure of each column is bold.

    Args:
        table: The results.
    """
    header, rows = table.grid()
    titles = "".join(f"<th>{_text(title)}</th>" for title in header)
    lines = []
    for (method, _), *cells in rows:
        figures = (
            f"<td><b>{_text(cell)}</b></td>" if best else f"<td>{_text(cell)}</td>"
            for cell, best in cells
        )
        lines.append(f"<tr><th scope=row>{_text(method)}</th>{''.join(figures)}</tr>")
    return (
        f"<p class=remark>{_text(table.protocol)}</p>"
        f"<div class=scroll><table><thead><tr>{titles}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def details_html(groups: Mapping[str, Mapping[str, object]]) -> str:
    """Small tables of names and values; empty ones are left out.

    Args:
        groups: The tables by title.
    """
    blocks = []
    for title, entries in groups.items():
        if entries:
            lines = "".join(
                f"<tr><th scope=row>{_text(key)}</th><td>{_text(value)}</td></tr>"
                for key, value in entries.items()
            )
            blocks.append(
                f"<div><h3>{_text(title)}</h3><table><tbody>{lines}</tbody></table></div>"
            )
    return f"<div class=details>{''.join(blocks)}</div>" if blocks else ""


def command_html(command: str) -> str:
    """A command that one click selects.

    Args:
        command: The command, plain text.
    """
    return f"<pre>{_text(command)}</pre>"


def image_html(label: str, caption: str, png: bytes) -> str:
    """An image with its label.

    Args:
        label: The label.
        caption: A line below it, or empty.
        png: The image.
    """
    # The line is there even when empty: all pictures of a row begin at the same height.
    return (
        f"<figure><figcaption><b>{_text(label)}</b><span>{_text(caption)}</span></figcaption>"
        f'<img alt="{_text(label)}" src="{_inline(png)}"></figure>'
    )


def drawing_html(label: str, caption: str, drawing: Drawing) -> str:
    """A drawing whose ink follows the page: dark on light and on paper, light on dark.

    Args:
        label: The label.
        caption: A line beside it, or empty.
        drawing: The drawing.
    """
    light, dark = _inline(drawing.for_light), _inline(drawing.for_dark)
    return (
        f"<figure><figcaption><b>{_text(label)}</b> "
        f"<span>{_text(caption)}</span></figcaption><picture>"
        f'<source media="print" srcset="{light}">'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{_text(label)}" src="{light}"></picture></figure>'
    )


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f21; --soft: #66707a; --page: #ffffff; --card: #f5f6f7;
  --line: #dfe3e6; --accent: #e8590c; --note: #fff4e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #9aa4ad; --page: #16181a;
  --card: #202326; --line: #33383d; --note: #33261a; } }
@media print { :root { color-scheme: light; --ink: #1d1f21; --soft: #66707a; --page: #ffffff;
  --card: #ffffff; --line: #dfe3e6; --note: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem 1rem 3rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 0 0 .3rem; color: var(--soft); font-weight: 600; }
.summary { margin: 0; color: var(--soft); font-size: 1.05rem; }
.remark { margin: 0 0 .6rem; color: var(--soft); font-size: .9rem; }
.note { margin: .8rem 0 0; padding: .5rem .8rem; background: var(--note);
  border-left: 4px solid var(--accent); border-radius: 0 6px 6px 0; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 215px), 1fr)); }
.zooms figcaption span { display: none; }
.zooms { grid-template-columns: repeat(auto-fit, minmax(min(46%, 170px), 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  align-items: start; }
.wide figure { max-width: 800px; }
figure { margin: 0; max-width: 460px; break-inside: avoid; }
figcaption { font-size: .9rem; line-height: 1.35; margin-bottom: .3rem; }
figcaption span { display: block; min-height: 1.35em; color: var(--soft);
  font-variant-numeric: tabular-nums; }
figure img { display: block; width: 100%; height: auto; border-radius: 4px;
  image-rendering: pixelated; }
picture img { image-rendering: auto; border-radius: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
td, th { padding: .35rem .8rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-weight: 400; vertical-align: top; }
thead th { color: var(--soft); }
th:first-child { text-align: left; }
td b { color: var(--accent); }
pre { margin: 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all;
  font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.details { display: grid; gap: 1.4rem 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); align-items: start; }
.details table { width: 100%; }
.details th { color: var(--soft); }
.details td { white-space: normal; overflow-wrap: anywhere; padding-right: 0; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } section { break-inside: auto; }
  h2 { break-after: avoid; } }
"""
