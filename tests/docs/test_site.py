"""The pages: built without a warning, asking nothing of other hosts; no broken link; every public name explained."""

import dataclasses
import html.parser
import os
import pydoc
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from sharing import make_once

import slm_jax
from slm_jax.cli import COMMANDS
from slm_jax.commands.bench import KINDS
from slm_jax.tasks.config import RunConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
TEXTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*_*.py")),
]
MODULES = {"slm_jax", *(path.stem for path in (ROOT / "slm_jax").glob("[a-z]*") if path.stem != "train")}


def build(folder: Path) -> None:
    """Build the site into a folder; ``--strict`` fails at the first warning."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # Without the first setting Material prints a notice about a future version of MkDocs at each start.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built pages."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package, reason='the pages need pip install -e ".[docs]"')
    return make_once(tmp_path_factory, "site", build)


class Page(html.parser.HTMLParser):
    """What a page asks for when it is opened, the places in it that a link can lead to, and its links."""

    def __init__(self, path: Path):
        super().__init__()
        self.asks: list[str] = []
        self.places: set[str] = set()
        self.links: list[str] = []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the addresses and places of an element."""
        values = {name: value or "" for name, value in attrs}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a":
            self.links.append(values.get("href", ""))
        elif tag != "link" or values.get("rel") not in ("canonical", "prev", "next"):
            self.asks += [values[name] for name in ("src", "srcset", "href", "data", "poster") if name in values]
        self.asks += re.findall(r"url\(([^)]*)\)", values.get("style", ""))


@pytest.mark.slow
def test_the_site_asks_nothing_of_other_hosts(site: Path):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 40
    for path, page in pages.items():
        outside = [address for address in page.asks if re.match(r"\s*(https?:)?//", address)]
        assert outside == [], path
        # What the theme would request from another host: diagrams, a repository's stars, fonts.
        assert not re.search(r'class="mermaid"|data-md-component="source"|fonts\.googleapis|mathjax', page.text), path
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(site: Path):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for link in [*page.links, *(address for address in page.asks if address.endswith((".png", ".svg")))]:
            target, _, place = link.partition("#")
            if re.match(r"[a-z]+:", link):
                if target.startswith((f"{REPOSITORY}/blob/main/", f"{REPOSITORY}/tree/main/")):
                    assert (ROOT / target.split("/main/")[1]).exists(), (path.name, link)
                continue
            file = (path.parent / target).resolve() if target else path
            assert file.exists(), (path.name, link)
            if place and file in pages:
                assert place in pages[file].places or place.startswith("__"), (path.name, link)


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path):
    places = {place for path in (site / "reference").glob("*.html") for place in Page(path).places}
    index = Page(site / "reference" / "index.html")
    for name in slm_jax.__all__:
        assert f"<code>{name}</code>" in index.text, name
    broken = [link for link in index.links if "#slm_jax." in link and link.partition("#")[2] not in places]
    assert broken == []


def test_no_relative_link_is_broken():
    broken = []
    for text in TEXTS:
        content = text.read_text()
        if text.suffix == ".py":
            content = "\n".join(line[2:] for line in content.splitlines() if line.startswith("#"))
        prose = re.sub(r"^( *)```.*?^\1```|`[^`\n]+`", "", content, flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose):
            target, _, place = link.partition("#")
            path = (text.parent / target).resolve() if target else text
            if path.parent == DOCS / "notebooks":  # pages that the site makes from the notebooks
                path = ROOT / "notebooks" / f"{path.stem}.ipynb"
            made = path.parent.name == "reference" and place.startswith(("slm_jax.", "slm-jax-"))
            if re.match(r"https?:|mailto:", link) or (path.exists() and (made or not place or path.suffix != ".md")):
                continue
            if not path.exists() or place not in headings(path):
                broken.append((text.relative_to(ROOT).as_posix(), link))
    assert broken == []


def headings(path: Path) -> set[str]:
    """Return the anchors that a page's headings get."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", prose, re.M)
    given = set(re.findall(r"\{ ?#([\w-]+)", prose)) | set(re.findall(r'<a (?:id|name)="([^"]+)"', prose))
    words = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return given | {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in words}


def test_every_notebook_is_listed_with_its_address():
    page = (DOCS / "notebooks.md").read_text()
    path = REPOSITORY.removeprefix("https://github.com/")
    for notebook in (ROOT / "notebooks").glob("*_*.py"):
        assert f"(notebooks/{notebook.stem}.md)" in page
        address = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{notebook.stem}.ipynb"
        assert f"({address})" in page


def test_the_names_beside_those_of_the_book_exist():
    rows = re.findall(r"^\| (?!the book)[^|]* \| ([^|]*) \|", (DOCS / "book.md").read_text(), re.M)
    code = {name for cell in rows for name in re.findall(r"`(\w+(?:\.\w+)+)(?:\(.*?\))?`", cell)}
    names = {name.removeprefix("slm_jax.") for name in code if name.split(".")[0] in MODULES}
    assert len(names) > 30
    assert [name for name in names if not pydoc.locate(f"slm_jax.{name}")] == []


def test_what_the_texts_import_is_in_the_reference():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)", pages, re.M))
    packages = set(re.findall(r"<!-- modules: (\S+) -->", pages))
    imports = re.compile(r"^(?:# )?\s*(?:from|import) (slm_jax\.[\w.]+)", re.M)
    imported = {module for text in TEXTS for module in imports.findall(text.read_text())}
    left = {module for module in imported - shown - packages if module.rpartition(".")[0] not in packages}
    assert left <= {"slm_jax.cli", "slm_jax.commands"}


def test_every_command_and_section_has_its_list():
    commands = (DOCS / "reference" / "commands.md").read_text()
    for name in COMMANDS:
        assert f"\n## slm-jax {name}\n" in commands
        kinds = [f"bench {kind}" for kind in KINDS] if name == "bench" else [name]
        assert all(f"<!-- options: {kind} -->" in commands for kind in kinds)
    keys = (DOCS / "reference" / "configuration.md").read_text()
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.type):
            assert f"<!-- keys: {field.name} -->" in keys
    assert "<!-- keys: run -->" in keys
