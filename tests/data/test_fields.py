"""What must hold of fields: what is missing or no text is named with its place, in one line."""

import pytest

from slm_jax.data.fields import get_field, get_text
from slm_jax.errors import InputError


def test_a_field_is_returned_as_it_is():
    fields = {"text": "é \U0001f40d", "n": None, "empty": ""}
    assert get_field(fields, "n", "") is None
    assert (get_text(fields, "text", ""), get_text(fields, "empty", "")) == ("é \U0001f40d", "")


@pytest.mark.parametrize("get", [get_field, get_text])
@pytest.mark.parametrize(("fields", "there"), [({"label": 1, 2: "a"}, "label, 2"), ({}, "none")])
def test_a_field_that_is_not_there_is_named_with_those_that_are(get, fields, there):
    with pytest.raises(InputError) as error:
        get(fields, "text", "spam.csv line 12")
    assert str(error.value) == f"spam.csv line 12: no field 'text' but {there}; add it"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, "text is 1; expected text"),
        (None, "text is None; expected text"),
        (["a\n"] * 40, r"text is \['a\\n', .{40,52}; expected text"),
        ("ab\udfff", "text has half a surrogate pair, which is no character; take it out"),
    ],
)
def test_text_must_be_text_that_can_be_written(value, expected):
    with pytest.raises(InputError, match=rf"^a line 1: {expected}$") as error:
        get_text({"text": value}, "text", "a line 1")
    assert "\n" not in str(error.value)
