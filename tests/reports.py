"""Folders of runs that were never trained, and a page taken apart; shared by the tests of reports."""

import json
import re
from html.parser import HTMLParser

CONFIG = "task: pretraining\ntrain: {steps: 100}\n"
VOID = {"meta", "img", "br", "path", "use", "rect", "image"}  # need no end tag, or end themselves


def train(step, loss=1.0, **more):
    return {
        "step": step, "split": "train", "loss": loss, "learning_rate": 1e-3, "grad_norm": loss, "tokens": 10 * step,
        "tokens_per_second": 100.0, "seconds": 0.1 * step, **more,
    }  # fmt: skip


def val(step, loss=1.0, **more):
    return {"step": step, "split": "val", "loss": loss, **more}


def make_run(folder, rows=(), config=CONFIG, **files):
    """Write a run's folder; ``samples_md`` is the text of samples.md."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in files.items():
        stem, _, kind = name.rpartition("_")
        (folder / f"{stem.replace('_', '-')}.{kind}").write_text(text, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """A page taken apart: its text, elements and attributes; fails where an element is not closed in its turn."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.attributes, self.open, self.texts = html, [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)

    def values(self, name):
        return [value for key, value in self.attributes if key == name]

    def check_whole(self):
        """It needs nothing but itself: what it refers to is inside it, under a name that is there once."""
        ids = self.values("id")
        assert len(ids) == len(set(ids))
        referred = [value for name in ("src", "href", "xlink:href", "action", "srcset") for value in self.values(name)]
        referred += re.findall(r"url\(([^)]*)\)", self.html)
        assert all(
            value.startswith(("#", "data:image/png;base64,", "data:image/svg+xml;base64,")) for value in referred
        )
        assert {value[1:] for value in referred if value.startswith("#")} <= set(ids)
        assert "@import" not in self.html
        assert not {"script", "link", "iframe", "object", "embed"} & set(self.elements)
        assert self.elements.count("h1") == self.elements.count("title") == 1
        assert "lang" in dict(self.attributes)
        pictures = [value for key, value in self.attributes if key in ("aria-label", "alt")]
        assert len(pictures) >= self.elements.count("img")
        assert all(pictures)
        return self
