"""What is quoted from outside: without passwords and control characters, and short."""

from __future__ import annotations

import time

import pytest

from attune.text import SHOWN, message, redact, shown


@pytest.mark.parametrize(
    "text",
    [
        "http://me:s3cret@host/x",
        "API request to http://me:s3c/r@et@host:80/api failed",
        "postgresql+psycopg://host/db?user=me&password=s3cret",
        "http://host/?access_token=s3cret&x=1",
        "host=db password='s3 cret' user=me",
        "{'api_key': 's3cret', 'x': 1}",
    ],
)
def test_passwords_are_hidden(text):
    assert "s3" not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize("value", ["http://me:s3 cret@host", "me:s3cret@host", {"uri": "http://me:s3cret@host"}])
def test_a_value_with_a_password_is_shown_without(value):
    assert "s3" not in shown(value)
    assert "host" in shown(value)


@pytest.mark.parametrize(
    "text", ["owner/name/file@" + "a" * 40, "sqlite:///mlflow.db", "params/tiny.yaml:model.path: x"]
)
def test_what_holds_no_password_stays(text):
    assert redact(text) == text
    assert shown(text) == repr(text)


@pytest.mark.parametrize(
    "value", ["/" * 10**6, "//" * 10**6 + " a@b", "token=" * 10**5, [[list(range(10**5))] * 9] * 9]
)
def test_a_large_value_is_short_at_once(value):
    start = time.monotonic()
    assert len(shown(value)) <= SHOWN
    assert time.monotonic() - start < 2


def test_a_message_is_a_few_printable_lines():
    assert message("a\u202eb\x1b[31m") == r"a\u202eb\x1b[31m"
    lines = message("\n".join(["x" * 5000] * 100)).split("\n")
    assert (len(lines), lines[-1]) == (9, "and 92 more")
    assert max(map(len, lines)) <= 700
