"""The pages: built without a warning, asking nothing of other hosts; no broken link; every public name explained."""

import ast
import dataclasses
import html.parser
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import slm_jax
from slm_jax.cli import COMMANDS
from slm_jax.commands.bench import KINDS
from slm_jax.tasks.config import RunConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
TEXTS = [
    *(ROOT / "README.md", ROOT / "CHANGELOG.md"),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*_*.py")),
]
MODULES = sorted(
    {name for page in (DOCS / "reference").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}
)
# Names that mean the same wherever they are a parameter: see the glossary.
EVERYWHERE = {
    *("batch_size", "context_length", "deterministic", "dtype", "max_new_tokens", "n_devices", "n_tokens", "seed"),
    "vocab_size",
}
PLAIN = {
    *("int", "float", "str", "bool", "None", "Any", "object", "np", "ndarray"),
    *("dict", "list", "tuple", "Mapping", "Sequence", "Iterable", "Callable"),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- The built site ---


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built pages; building it with ``--strict`` fails at the first warning."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package, reason='the pages need pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # Material says at each start which version of MkDocs it will not support.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


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
        """Take what counts of an element."""
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
        # What the theme would then ask another host for: diagrams, a repository's stars, fonts.
        assert not re.search(r'class="mermaid"|data-md-component="source"|fonts\.googleapis|mathjax', page.text), path
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(site: Path):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
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
    index = (DOCS / "reference" / "index.md").read_text()
    for name in slm_jax.__all__:
        link = re.search(rf"^\| \[`{name}`\]\[([\w.]+)\]", index, re.M)
        assert link, f"{name} is not in reference/index.md"
        assert link[1] in places, link[1]
    for module in MODULES:
        if module != "slm_jax.tasks.config":  # whose sections are lists of keys
            missing = {f"{module}.{function}" for function, _, _ in public_names(module)} - places
            assert not missing, missing


@pytest.fixture
def hooks():
    """The module of the hooks, as MkDocs loads it."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_link_that_leaves_the_pages_leads_to_the_repository_or_fails(hooks):
    from mkdocs.config import load_config
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page as MkDocsPage

    config = load_config(str(ROOT / "mkdocs.yml"))
    config.plugins._current_plugin = "hooks"  # as MkDocs sets it while it calls them
    page = MkDocsPage("x", File("howto/x.md", str(DOCS), config.site_dir, False), config)
    files = Files([])

    def changed(markdown):
        return hooks.on_page_markdown(markdown, page, config, files)

    assert changed("[a](../../slm_jax/model.py)") == f"[a]({REPOSITORY}/blob/main/slm_jax/model.py)"
    assert changed("[a](../../slm_jax)") == f"[a]({REPOSITORY}/tree/main/slm_jax)"
    assert changed("[a](../design.md#x)") == "[a](../design.md#x)"
    assert changed("```\n[a](../../none.py)\n```") == "```\n[a](../../none.py)\n```"
    assert changed("![a](../../benchmarks/tiny_loss.png)") == "![a](../repository/benchmarks/tiny_loss.png)"
    assert [file.src_uri for file in files] == ["repository/benchmarks/tiny_loss.png"]
    with pytest.raises(PluginError, match=r"howto/x\.md: the link to \.\./\.\./none\.py"):
        changed("[a](../../none.py)")


def test_a_notebook_becomes_a_page(hooks, tmp_path):
    cells = [
        {"cell_type": "markdown", "source": [f"# 1. A\n[b]({REPOSITORY}/blob/main/notebooks/02_b.ipynb)\n<details>"]},
        {
            "cell_type": "code",
            "source": ["x = 1"],
            "outputs": [{"text": ["one\n"]}, {"data": {"image/png": "aGk=", "text/plain": "a picture"}}],
        },
    ]
    notebook = tmp_path / "01_a.ipynb"
    notebook.write_text(json.dumps({"cells": cells}))
    page, pictures = hooks.notebook_page(notebook)
    for text in ("[b](02_b.md)", '<details markdown="1">', "```python\nx = 1\n```", "\none\n"):
        assert text in page
    assert "a picture" not in page
    assert pictures == {"01_a_1.png": b"hi"}


# --- Links of all texts ---


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_no_relative_link_is_broken(text: Path):
    content = text.read_text()
    if text.suffix == ".py":
        content = "\n".join(line[2:] for line in content.splitlines() if line.startswith("#"))
    prose = re.sub(r"^( *)```.*?^\1```|`[^`\n]+`", "", content, flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose):
        if re.match(r"https?:|mailto:", link):
            continue
        target, _, place = link.partition("#")
        path = (text.parent / target).resolve() if target else text
        if is_notebook_page(path):
            path = ROOT / "notebooks" / f"{path.stem}.ipynb"
        assert path.exists(), link
        if place and path.suffix == ".md":
            if path.parent.name == "reference" and place.startswith(("slm_jax.", "slm-jax-")):
                continue  # made when the site is built, where another test looks
            assert place in headings(path), link


def is_notebook_page(path: Path) -> bool:
    return path.parent == DOCS / "notebooks"


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


def test_the_notebooks_read_here_lead_to_files_that_exist():
    for notebook in (ROOT / "notebooks").glob("*_*.ipynb"):
        text = "".join("".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"])
        for target in re.findall(rf"{re.escape(REPOSITORY)}/(?:blob|tree)/main/([^)\s#]+)", text):
            assert (ROOT / target).exists(), (notebook.name, target)


# --- Every name is explained ---


def public_names(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef, str]]:
    """Yield the public functions, classes and methods of a module: name, definition, docstring of what it is in."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    path = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method, ast.get_docstring(node) or ""


def is_overload(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def unexplained(function: ast.FunctionDef, more: str) -> list[str]:
    """Return the parameters of which neither name in the docstring nor type says what they are.

    A plain number, text, flag or array has to be named in the docstring of the function or its class. A type of ours
    (``GPTConfig``), one with a shape (``Float[Array, "batch seq"]``) or a path speaks for itself, as does the only
    parameter of a function, and what means the same everywhere.
    """
    docstring = f"{ast.get_docstring(function) or ''} {more}"
    if "rguments as for" in docstring or "rguments and errors are those of" in docstring:
        return []
    given = function.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    named = [one for one in parameters if one is not None and one.arg not in ("self", "cls")]
    return [
        one.arg
        for one in named
        if len(named) > 1
        and one.arg not in EVERYWHERE
        and set(re.findall(r"[A-Za-z_]+", ast.unparse(one.annotation) if one.annotation else "")) <= PLAIN
        and not re.search(rf"\b{one.arg.removesuffix('s')}s?\b", docstring)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring_that_explains_its_parameters(module: str):
    for name, node, more in public_names(module):
        if is_overload(node):
            continue
        assert ast.get_docstring(node), name
        if isinstance(node, ast.FunctionDef):
            assert unexplained(node, more) == [], name


def test_what_a_docstring_leaves_out_is_seen():
    [bare, named, typed, alone] = ast.parse(
        '''
def bare(x: int, rate: float):
    """Return x."""
def named(x: int, rate: float):
    """Return x, but for a share ``rate``."""
def typed(x: Array, cfg: GPTConfig):
    """Return it."""
def alone(text: str):
    """Return its length."""
'''
    ).body
    assert unexplained(bare, "") == ["rate"]
    assert unexplained(named, "") == unexplained(typed, "") == unexplained(alone, "") == []


def test_what_the_texts_import_is_in_the_reference():
    imported = {
        module
        for text in TEXTS
        for module in re.findall(r"^(?:# )?\s*(?:from|import) (slm_jax\.[\w.]+)", text.read_text(), re.M)
    }
    assert {"slm_jax.tasks.instruction", "slm_jax.training.host_memory"} <= imported
    shown = {".".join(module.split(".")[:length]) for module in MODULES for length in range(2, 5)}
    assert imported - shown <= {"slm_jax.cli", "slm_jax.commands"}


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
