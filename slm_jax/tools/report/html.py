"""The little HTML that a report needs. What is not :class:`Html` already is text, and is escaped."""

import html
import json
import re
from collections.abc import Iterable, Sequence

# What HTML has no place for: control characters, and halves of characters.
_NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Text that is HTML, and stays as it is."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Return HTML that shows a text as it is; :class:`Html` stays."""
    return text if isinstance(text, Html) else Html(html.escape(_NO_TEXT.sub("\ufffd", str(text))))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """Return an element. ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``; True is a bare word."""
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{escape(value)}"')
    return Html(f"<{' '.join(words)}>{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Return parts one after the other."""
    return Html("".join(map(escape, parts)))


def typed(value: object, marked: bool = False) -> Html:
    """Return a value as it is typed in a recipe."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # a key that JSON has not, or a list that holds itself
        text = str(value)
    return tag("code", tag("mark", text) if marked else text)


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: Iterable[int] = (), caption: object = None
) -> Html:
    """Return a table in a box of its own, which scrolls where the page is too narrow for it.

    Args:
        head: the names of the columns.
        rows: their cells; the first of each is its heading.
        numbers: the columns that are flush right.
        caption: what it shows.
    """
    right = set(numbers)

    def row(cells: Sequence[object], heading: bool) -> Html:
        made = []
        for column, cell in enumerate(cells):
            scope = "col" if heading else "row" if column == 0 else None
            made.append(tag("th" if scope else "td", cell, scope=scope, class_="n" if column in right else None))
        return tag("tr", *made)

    body = [row(cells, heading=False) for cells in rows]
    title = [] if caption is None else [tag("caption", caption)]
    content = tag("table", *title, tag("thead", row(head, heading=True)), tag("tbody", *body))
    return scrolled(content, caption or next(filter(None, head), "table"))


def scrolled(content: Html, label: object) -> Html:
    """Return a box of its own, which scrolls where the page is too narrow; ``label`` says what is in it."""
    return tag("div", content, class_="scroll", role="region", tabindex="0", aria_label=label)


def details(summary: object, *content: object, opened: bool = False) -> Html:
    """Return what is folded away until it is clicked."""
    return tag("details", tag("summary", summary), *content, open=opened)


def section(name: str, title: str, *content: object) -> Html:
    """Return a section that ``#name`` leads to; none where there is no content."""
    if not any(content):
        return Html("")
    return tag("section", tag("h2", title, id=name), *content)


def page(title: str, *body: object) -> str:
    """Return the whole document, which needs nothing but itself."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(map(escape, body))
        + "\n</main>\n</body>\n</html>\n"
    )


_CSS = """
:root { color-scheme: light dark; --page: #fff; --text: #1b2330; --dim: #566173; --line: #d6dce4; --box: #f5f7f9;
  --mark: #fdf0c8; --heat: 31 111 190;
  --c0: #1f6fb4; --c1: #c2410c; --c2: #2e7d32; --c3: #8a3fb0; --c4: #92700a; --c5: #0b7a80; --c6: #b42a66;
  --c7: #5a6270 }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --text: #dfe5ec; --dim: #9aa6b5; --line: #323b47;
  --box: #1a2028; --mark: #4a3d12; --heat: 92 164 232;
  --c0: #6cb0ee; --c1: #fb8c5c; --c2: #7cc77f; --c3: #cf9af0; --c4: #dfbb4d; --c5: #55c6cc; --c6: #f386b4;
  --c7: #aab3bf } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 68rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; overflow-wrap: anywhere }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere }
p.dim, figcaption, caption, dt { color: var(--dim); font-size: .875rem }
a { color: var(--c0) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0 0; font-size: .875rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .75rem 1.25rem; margin: 1rem 0 }
dd { margin: 0; overflow-wrap: anywhere }
figure { margin: 0; min-width: 0; break-inside: avoid }
figcaption strong { color: var(--text) }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem }
.grid > figure { max-width: 36rem }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: .5rem 0; padding: 0;
  font-size: .875rem }
.legend li { display: flex; align-items: center; gap: .4rem; min-width: 0; overflow-wrap: anywhere }
.legend svg { width: 2rem; height: .75rem; flex: none }
.scroll { overflow-x: auto; margin: .5rem 0 1rem }
table { border-collapse: collapse; font-size: .875rem }
caption { text-align: left; padding-bottom: .25rem }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  max-width: 26rem; overflow-wrap: break-word; font-weight: normal }
thead th { color: var(--dim); vertical-align: bottom }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code, pre { font: .8125rem/1.5 ui-monospace, monospace }
code { overflow-wrap: anywhere }
th code { white-space: nowrap }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0; padding: .6rem .75rem; background: var(--box);
  border-radius: .3rem }
mark { background: var(--mark); color: inherit; padding: 0 .15rem }
details { margin: .4rem 0 }
summary { cursor: pointer; font-size: .9375rem }
details > .grid { margin: .5rem 0 1rem }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 0 1rem }
.answers > div { min-width: 0 }
.answers h4 { font-size: .8125rem; font-weight: normal; color: var(--dim); margin: .4rem 0 0 }
.matrix td { text-align: center; padding: .4rem .75rem; border: 1px solid var(--line);
  background: rgb(var(--heat) / calc(var(--share) * .55)); font-variant-numeric: tabular-nums }
.matrix th { padding-right: .75rem; max-width: 12rem; vertical-align: middle }
.matrix thead th { text-align: center }
.matrix small { display: block; color: var(--text) }
.heads { display: grid; gap: .4rem; margin: .25rem 0 .75rem; justify-content: start }
.heads figure { border: 1px solid var(--line) }
.heads img { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated }
.tokens { display: flex; flex-wrap: wrap; gap: .25rem; font: .8125rem/1.5 ui-monospace, monospace }
.tokens span { background: var(--box); border: 1px solid var(--line); border-radius: .2rem; padding: 0 .3rem }
.tokens small { color: var(--dim); padding-right: .3rem }
@media (max-width: 30rem) { body { font-size: 15px } main { padding: .75rem } dl { grid-template-columns: 1fr 1fr } }
@media print { :root { --page: #fff; --text: #000 } nav { display: none } .scroll { overflow: visible }
  main { max-width: none } h2, h3 { break-after: avoid } }
"""
