"""What must hold of the HTML: text is shown as it is, and cannot become anything else."""

import pytest
from reports import Page

from slm_jax.tools.report.html import Html, details, escape, join, page, section, table, tag


@pytest.mark.parametrize(
    "text", ["<b>&\"'</b>", "日本語 😀", "</style><script>alert(1)</script>", "a < b", "tab\tline\n"]
)
def test_text_is_shown_as_it_is(text):
    whole = page(text, tag("p", text, title=text), table([text], [[text]], caption=text), details(text, text))
    parsed = Page(whole)
    assert parsed.texts.count(text) == 7  # the title, and each of the six places
    assert parsed.values("title") == [text]
    assert "script" not in parsed.elements


def test_what_is_no_text_is_replaced():
    assert escape("a\x00\x1b\ud800b") == "a\ufffd\ufffd\ufffdb"
    page("\ud800").encode("utf-8")


def test_html_stays_and_parts_are_joined():
    assert escape(Html("<b>")) == "<b>"
    assert join([Html("<b>"), "<", 3]) == "<b>&lt;3"


def test_attributes():
    assert tag("a", "x", href="#y", class_="c", aria_label='"', open=True, id=None, hidden=False) == (
        '<a href="#y" class="c" aria-label="&quot;" open>x</a>'
    )


def test_a_table_has_headings():
    html = table(["name", "count"], [["a", 1], ["b", 2]], numbers=(1,))
    assert html.count('scope="col"') == html.count('scope="row"') == 2
    assert html.count('class="n"') == 3


def test_a_section_without_content_is_none():
    assert section("x", "X", Html("")) == ""
    assert 'id="x"' in section("x", "X", Html("<p></p>"))
