"""The few pieces of HTML that the report is made of. Text is escaped; only `Html` goes in as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --good: #1f8a4c; --bad: #c0392b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.5rem; font-size: 1.25rem; } h3 { font-size: 1.05rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
small, .quiet { opacity: .75; } .headline { font-size: 1.1rem; background: var(--soft); padding: .8rem 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .85rem; }
details { margin: .6rem 0; } details > pre { background: var(--soft); padding: .8rem; } summary { cursor: pointer; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots svg { width: 26rem; max-width: 100%; height: auto; }
svg text { font-size: 9px; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
nav a { margin-right: 1rem; } a { color: inherit; }
"""


class Html(str):
    """Markup that is safe as it stands."""


def text(value: object) -> Html:
    """`value` as markup: escaped unless it is `Html`."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    return Html("\n".join(text(part) for part in parts))


def tag(name: str, *content: object, **attributes: str) -> Html:
    """`<name ...>content</name>`; `class_` stands for `class`."""
    written = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{''.join(text(part) for part in content)}</{name}>")


def paragraph(*content: object) -> Html:
    return tag("p", *content)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "", numeric: int = 1) -> Html:
    """A table whose first column heads its rows; columns from `numeric` on are aligned to the right."""

    def cell(name: str, column: int, value: object, scope: str | None = None) -> Html:
        attributes = {"class_": "number"} if column >= numeric else {}
        if scope is not None:
            attributes["scope"] = scope
        return tag(name, value, **attributes)

    head = tag("tr", *(cell("th", i, header, "col") for i, header in enumerate(headers)))
    body = [
        tag("tr", *(cell("th" if i == 0 else "td", i, value, "row" if i == 0 else None) for i, value in enumerate(row)))
        for row in rows
    ]
    title = [tag("caption", caption)] if caption else []
    return tag("div", tag("table", *title, tag("thead", head), tag("tbody", *body)), class_="scroll")


def details(summary: str, *content: object) -> Html:
    return tag("details", tag("summary", summary), *content)


def pre(content: str) -> Html:
    return tag("pre", content)


def section(anchor: str, title: str, *content: object) -> Html:
    return tag("section", tag("h2", title), join(content), id=anchor)


def page(title: str, content: object) -> str:
    """A whole document, nothing loaded from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{text(content)}\n</body>\n</html>\n"
    )
