"""What MkDocs has no option for: pages made of what the repository holds, and links from them into it.

- ``notebooks/*.ipynb`` become pages, with their pictures, below "Notebooks".
- ``<!-- options: COMMAND -->`` and ``<!-- keys: SECTION -->`` become tables of the options that the program has.
- A link that leaves ``docs/`` becomes an address in the repository; a picture is copied. What is not there is an error.
- Formulas become MathML: no script, no fonts.
"""

import base64
import html
import json
import os
import posixpath
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
sys.path.insert(0, str(HERE))  # MkDocs loads a hook without its folder
import options_tables  # noqa: E402

PICTURES = (".png", ".svg", ".jpg", ".gif")
FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.M | re.S)
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the repository, and add the notebooks to the navigation."""
    config.repo_url, config.repo_name = REPOSITORY, REPOSITORY.removeprefix("https://github.com/")
    for entry in config.nav or []:
        if "Notebooks" in entry:
            entry["Notebooks"] += [{_title(path): f"notebooks/{path.stem}.md"} for path in notebooks()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and its pictures."""
    for path in notebooks():
        page, pictures = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in tables of options, and turn links that leave ``docs/`` into addresses."""
    markdown = options_tables.fill_in(markdown)

    def address(match: re.Match[str]) -> str:
        target, hash_, anchor = match[2].partition("#")
        if not target.startswith("../") and "/../" not in target:
            return match[0]
        inside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), target))
        if inside.startswith("docs/") or inside == "docs":
            return match[0]
        source = ROOT / inside
        if inside.startswith("..") or not source.exists():
            raise PluginError(f"{page.file.src_uri}: the link to {target} leads to no file of the repository")
        if match[1].startswith("!") and source.suffix in PICTURES:
            copy = f"repository/{inside}"
            if copy not in files.src_uris:
                files.append(File.generated(config, copy, content=source.read_bytes()))
            return f"{match[1]}{os.path.relpath(copy, posixpath.dirname(page.file.src_uri) or '.')}{match[3]}"
        return f"{match[1]}{repository_address(inside)}{hash_}{anchor}{match[3]}"

    return _outside_fences(markdown, lambda text: LINK.sub(address, text))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML."""
    return re.sub(
        r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>',
        lambda match: convert(html.unescape(match[2]), display="inline" if match[1] == "span" else "block"),
        content,
        flags=re.S,
    )


def repository_address(path: str) -> str:
    """Return the address of a file or folder of the repository, given from its root."""
    return f"{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"


def notebooks() -> list[Path]:
    """Return the built notebooks in reading order: the numbered ones first."""
    return sorted((ROOT / "notebooks").glob("*_*.ipynb"), key=lambda path: (not path.stem[0].isdigit(), path.stem))


def _title(path: Path) -> str:
    """Return the first heading of a notebook."""
    for cell in json.loads(path.read_text())["cells"]:
        heading = re.search(r"^# (.+)$", "".join(cell["source"]), re.M) if cell["cell_type"] == "markdown" else None
        if heading:
            return heading[1]
    return path.stem


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by name."""
    # Not nbconvert's MarkdownExporter: each output needs its class, and the cell that installs is left out.
    parts, pictures = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_cell_text(text))
            continue
        if "google.colab" in text and "git clone" in text:  # the cell that installs on Colab
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![picture {len(pictures)} of this notebook]({name}){{ .output }}")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```{{ .text .output .no-copy }}\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def _cell_text(text: str) -> str:
    """Return a cell's Markdown for MkDocs: the badge's picture as text, links as on the site, details with Markdown."""
    text = re.sub(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)", r"[Open in Colab](\1){ .colab }", text)
    text = re.sub(rf"\]\({re.escape(REPOSITORY)}/blob/main/notebooks/(\w+)\.ipynb\)", r"](\1.md)", text)
    return text.replace("<details>", '<details markdown="1">')


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """Apply a change to a page, but for its blocks of code."""
    parts, end = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])
