"""The locator finds the line of every key, in every way TOML has to write one."""

import tomllib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpool.daemon.settings.config import KeyPath
from ublkpool.daemon.settings.toml_lines import KeyLines

EVERY_STYLE = '''# comment with [brackets] and key = 1
top = 1

[daemon]      # a table
run_dir = "/x # not a comment"
a.b . "c d" = true
text = """
fake = 1
[[device]]
with \\""" inside"""""
'quoted.key' = \'\'\'
also = fake\'\'\'
when = 1979-05-27 07:32:00

[[device]]
name = "one"
list = [
  1,  # first, with a ]
  [2, 3],
  { k = "}", l = [4] },
]
point = { x = 1, "y z" = { deep = 2 } }

[device.backend]
kind = 'file'

[[device.part]]
n = 1
[[device.part]]
n = 2

[[device]]
name = "two"
backend.kind = "null"
'''
EXPECTED: dict[KeyPath, int] = {
    ("top",): 2,
    ("daemon",): 4,
    ("daemon", "run_dir"): 5,
    ("daemon", "a", "b", "c d"): 6,
    ("daemon", "text"): 7,
    ("daemon", "quoted.key"): 11,
    ("daemon", "when"): 13,
    ("device",): 15,
    ("device", 0): 15,
    ("device", 0, "name"): 16,
    ("device", 0, "list", 0): 18,
    ("device", 0, "list", 1, 1): 19,
    ("device", 0, "list", 2, "l", 0): 20,
    ("device", 0, "point", "y z", "deep"): 22,
    ("device", 0, "backend"): 24,
    ("device", 0, "backend", "kind"): 25,
    ("device", 0, "part", 0, "n"): 28,
    ("device", 0, "part", 1, "n"): 30,
    ("device", 1): 32,
    ("device", 1, "name"): 33,
    ("device", 1, "backend", "kind"): 34,
}


@pytest.mark.parametrize(("path", "line"), EXPECTED.items())
def test_a_key_is_found_on_its_line(path: KeyPath, line: int) -> None:
    tomllib.loads(EVERY_STYLE)
    assert KeyLines(EVERY_STYLE).line_of(path) == line


def test_a_key_that_is_not_written_is_placed_at_its_table() -> None:
    lines = KeyLines("\n[daemon]\nx = 1\n")
    assert lines.line_of(("daemon", "missing")) == 2
    assert lines.line_of(("other",)) == 1


def test_windows_line_ends_count_once() -> None:
    assert KeyLines("a = 1\r\n\r\n[t]\r\nb = 2\r\n").line_of(("t", "b")) == 4


@pytest.mark.parametrize(
    "text", ["", "# only a comment", "\n\n", "a = 1", "[t]", "e = []", "e = {}", 'e = ""']
)
def test_a_short_document_ends_the_scan(text: str) -> None:
    tomllib.loads(text)
    assert KeyLines(text).line_of(()) == 1


SCALARS = st.one_of(
    st.integers().map(str),
    st.booleans().map(lambda value: str(value).lower()),
    st.sampled_from(['"a"', "'''x\ny = 1\n'''", '"""q\n[t]\n"""', "1.5e3", "07:32:00", '"#"', "''", '""']),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[\n" + " # ,]\n,\n".join(items) + "\n]"),
        st.lists(inner.filter(lambda text: "\n" not in text), max_size=3).map(
            lambda items: "{" + ", ".join(f"k{index} = {item}" for index, item in enumerate(items)) + "}"
        ),
    ),
    max_leaves=6,
)
DOCUMENTS = st.lists(st.tuples(st.sampled_from(["pair", "table", "array"]), VALUES), max_size=12)


@given(DOCUMENTS)
def test_keys_are_found_whatever_stands_between_them(parts: list[tuple[str, str]]) -> None:
    text, expected = _written(parts)
    document = tomllib.loads(text)
    lines = KeyLines(text)
    assert {path: lines.line_of(path) for path in expected} == expected
    assert set(expected) <= set(_paths(document))


def _written(parts: list[tuple[str, str]]) -> tuple[str, dict[KeyPath, int]]:
    """A document of these parts, and where its own keys stand."""
    text, table, array_length = "", (), 0
    expected: dict[KeyPath, int] = {}
    here: KeyPath = table
    for number, (part, value) in enumerate(parts):
        line = text.count("\n") + 1
        if part == "pair":
            text += f"key{number} = {value} # end\n"
            expected[(*here, f"key{number}")] = line
        elif part == "table":
            text += f"[t{number}.'in ner']\n"
            here = (f"t{number}", "in ner")
            expected[here] = line
        else:
            text += "[[array]]\n"
            here = ("array", array_length)
            array_length += 1
            expected[here] = line
    return text, expected


def _paths(value: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _paths(item, (*path, index))
