"""A plugin's names, signatures and option types are judged when it is loaded, each mistake in one line."""

import logging
from pathlib import Path

import pytest

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import loader
from ublkpool.bufpool.sdk.backend import Backend, Hint
from ublkpool.bufpool.sdk.options import Given

FUNCTIONS = "def get_size(): return 8192\ndef pread(buf, offset): pass\n"
CLASS = (
    "from typing import *\nfrom pathlib import Path\nimport msgspec\n"
    "from ublkpool.bufpool.sdk.backend import Backend, Properties\n"
    "from ublkpool.bufpool.sizes import ByteSize\n"
    "class Mine(Backend):\n    {}\n"
)
OPTIONS = CLASS.format("class Options(msgspec.Struct, frozen=True, kw_only=True):\n        {}")


def load(tmp_path: Path, code: str, given: Given | None = None) -> Backend:
    path = tmp_path / "mine.py"
    path.write_text(code)
    return loader.load(str(path), given or {})


def complaint(tmp_path: Path, code: str, given: Given | None = None) -> str:
    with pytest.raises(BackendError) as caught:
        load(tmp_path, code, given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("def pwrite(buf): pass", "mine.py:3: pwrite(buf) must be pwrite(buf, offset)"),
        ("def pwrite(buf, offset, fua): pass", "pwrite(buf, offset, fua) must be pwrite(buf, offset)"),
        ("def flush(now: bool): pass", "mine.py:3: flush(now) must be flush()"),
        ("def zero(offset, length, *, may_unmap): pass", "must be zero(offset, length)"),
        ("flush = True", "mine: flush must be a function, not True"),
        ("def open(path, /): pass", "mine.py:3: open: the parameter path must have a name"),
        ("def open(*paths): pass", "mine.py:3: open: the parameter *paths must have a name"),
        ("def close():\n    yield", "mine.py:3: close must not yield"),
        ("async def close():\n    yield", "mine.py:3: close must not yield"),
        ("def pwrit(buf, offset): pass", "mine.py:3: pwrit is called by nothing: did you mean pwrite?"),
        ("def pwritev(buffers, offset): pass", "did you mean pwrite?"),
        ("def discard(offset, length): pass", "mine.py:3: discard is called by nothing: did you mean trim?"),
        ("def write_zeroes(offset, length): pass", "did you mean zero?"),
        ("def fush(): pass", "did you mean flush?"),
        ("def opn(path): pass", "did you mean open?"),
        ("def trim_(offset, length): pass", "did you mean trim?"),
    ],
)
def test_a_function_that_could_not_be_called_is_refused(tmp_path: Path, code: str, line: str) -> None:
    assert line in complaint(tmp_path, FUNCTIONS + code)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (
            "def get_sise(): return 1\ndef pread(buf, offset): pass",
            "get_sise is called by nothing: did you mean",
        ),
        ("def get_size(): return 1\ndef prread(buf, offset): pass", "did you mean pread?"),
    ],
)
def test_a_misspelt_function_that_is_needed_is_named(tmp_path: Path, code: str, line: str) -> None:
    assert line in complaint(tmp_path, code)


@pytest.mark.parametrize(
    "code",
    [
        "def locate(block): pass",
        "def _pwrit(buf, offset): pass",
        "def pread_cached(buf, offset): pass",
        "def pwrite(buf, offset): pass\ndef pwritev(buffers, offset): pass",
        "from os import fsync, pwritev\nimport os",
        "def pwrite(buf, offset=0, *rest, retries=3): pass",
        "def open(path: str = '', *, deep: int = 1, **others): pass",
        "from functools import partial\ndef _f(a, buf, offset): pass\npwrite = partial(_f, 1)",
        "sizes = [1, 2]\nSIZE = 8192",
    ],
)
def test_helpers_of_the_author_s_own_are_fine(tmp_path: Path, code: str) -> None:
    load(tmp_path, FUNCTIONS + code)


def test_a_helper_with_a_near_name_and_other_parameters_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(tmp_path, FUNCTIONS + "def zeros(count): return bytes(count)")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "did you mean zero?" in record.getMessage()


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("def pwrite(self, buf, offset): pass", "mine.py:7: pwrite(self, buf, offset) must be"),
        ("def pread(self, buf): pass", "must be pread(self, buf, offset)"),
        ("def pread(buf, offset): pass", "pread(buf, offset) must be pread(self, buf, offset)"),
        ("def open(self): pass", "open(self) must be open(self, hint)"),
        ("@staticmethod\n    def flush(self): pass", "flush(self) must be flush()"),
        ("flush = 3", "Mine: flush must be a method, not 3"),
        (
            "def pwrit(self, buf, offset, fua): pass",
            "mine.py:7: pwrit is called by nothing: did you mean pwrite?",
        ),
        ("def pwrit(self, buf, offset): pass", "did you mean pwrite?"),
        ("def discard(self, offset, length): pass", "did you mean trim?"),
        ("def flush(self):\n        yield", "flush must not yield"),
    ],
)
def test_a_method_that_could_not_be_called_is_refused(tmp_path: Path, code: str, line: str) -> None:
    assert line in complaint(tmp_path, CLASS.format(code))


@pytest.mark.parametrize(
    "code",
    [
        "def pwrite(self, buf, offset, fua=False, **more): pass",
        "def pread(self, *arguments): pass",
        "def lookup(self, key): pass\n    closed = False",
        "@classmethod\n    def flush(cls): pass",
    ],
)
def test_methods_that_can_be_called_are_fine(tmp_path: Path, code: str) -> None:
    load(tmp_path, CLASS.format(code))


def test_an_inherited_method_is_judged_too(tmp_path: Path) -> None:
    code = CLASS.format("def trim(self, offset): pass").replace("class Mine", "class Base")
    code += "class Mine(Base): pass\nBACKEND = Mine\n"
    assert "must be trim(self, offset, length)" in complaint(tmp_path, code)


@pytest.mark.parametrize(
    ("annotation", "shown"), [("dict", "dict"), ("bytes", "bytes"), ("list[list[str]]", "list[list[str]]")]
)
def test_an_option_that_no_text_can_be_is_refused(tmp_path: Path, annotation: str, shown: str) -> None:
    line = f"mine: option x has the type {shown}, which cannot be read from x=VALUE; use str, int"
    assert complaint(tmp_path, FUNCTIONS + f"def open(x: {annotation}): pass").startswith(line)
    assert complaint(tmp_path, OPTIONS.format(f"x: {annotation}")).startswith(line)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (
            FUNCTIONS + "def open(x: 'Sise'): pass",
            "the types of the parameters of open cannot be read: NameError",
        ),
        (OPTIONS.format("x: 'Sise'"), "mine: the types of its options cannot be read: NameError"),
        (
            CLASS.format("Options = dict"),
            "mine: Options must be a subclass of msgspec.Struct, not <class 'dict'>",
        ),
    ],
)
def test_options_whose_types_cannot_be_read_are_refused(tmp_path: Path, code: str, line: str) -> None:
    assert line in complaint(tmp_path, code)


def test_a_record_that_refuses_its_values_is_one_line(tmp_path: Path) -> None:
    code = OPTIONS.format(
        "x: int = 1\n        def __post_init__(self):\n            if self.x > 9: raise ValueError('x is over\\n9')"
    )
    assert complaint(tmp_path, code, {"x": "10"}) == "mine: x is over 9; options are: [x=NUMBER]"


OPENS = FUNCTIONS + "from typing import *\nfrom enum import Enum\nimport msgspec\nseen = None\n"


def opened_with(tmp_path: Path, parameters: str, given: Given) -> object:
    names = "locals()"
    backend = load(tmp_path, OPENS + f"def open({parameters}):\n    global seen\n    seen = {names}", given)
    assert isinstance(backend, loader.FunctionBackend)
    backend.open(Hint("x", tmp_path))
    return backend.module.seen


@pytest.mark.parametrize(
    ("parameters", "given", "values"),
    [
        ("urls: list[str]", {"urls": ["b", "a"]}, {"urls": ["b", "a"]}),
        ("urls: list[str]", {"urls": "a"}, {"urls": ["a"]}),
        ("ports: list[int] = []", {"ports": ["2", "1"]}, {"ports": [2, 1]}),
        ("ports: list[int] = []", {}, {"ports": []}),
        ("ports: list[int] | None = None", {"ports": "3"}, {"ports": [3]}),
        (
            "size=1, **options",
            {"size": "2", "b": "x", "a": "y"},
            {"size": "2", "options": {"b": "x", "a": "y"}},
        ),
        ("**options: int", {"options": "3"}, {"options": {"options": 3}}),
        ("**options: list[str]", {"a": ["x", "y"], "b": "z"}, {"options": {"a": ["x", "y"], "b": ["z"]}}),
        ("mode: Literal[1, 2]", {"mode": "2"}, {"mode": 2}),
        ("x: int | str", {"x": "a"}, {"x": "a"}),
        ("x: Any", {"x": "a"}, {"x": "a"}),
    ],
)
def test_lists_and_free_keys_reach_open(
    tmp_path: Path, parameters: str, given: Given, values: dict[str, object]
) -> None:
    assert opened_with(tmp_path, parameters, given) == values


@pytest.mark.parametrize(
    ("parameters", "given", "line"),
    [
        ("size: int", {"size": ["1", "2"]}, "mine: option size: is given twice; options are: size=NUMBER"),
        (
            "ports: list[int]",
            {"ports": ["1", "b"]},
            "option ports: 'b' is not a number; options are: ports=NUMBER...",
        ),
        ("ports: list[int]", {}, "option ports is missing"),
        ("**options: int", {"a": "x"}, "option a: 'x' is not a number; options are: [KEY=NUMBER ...]"),
        ("path: str, **options", {}, "option path is missing; options are: path=TEXT [KEY=TEXT ...]"),
        ("x: Annotated[int, msgspec.Meta(ge=1)]", {"x": "0"}, "option x: Expected `int` >= 1"),
        ("mode: Literal[1, 2]", {"mode": "3"}, "option mode: '3' is not one of 1, 2"),
    ],
)
def test_wrong_lists_and_keys_are_one_line(tmp_path: Path, parameters: str, given: Given, line: str) -> None:
    assert line in complaint(tmp_path, OPENS + f"def open({parameters}): pass", given)


def test_lists_and_free_keys_reach_a_class(tmp_path: Path) -> None:
    code = OPTIONS.format(
        "urls: list[str] = []\n        more: dict[str, int] = {}\n        size: ByteSize = 4096"
    )
    backend = load(tmp_path, code, {"urls": ["x", "y"], "a": "1", "size": "1M"})
    assert backend.options == type(backend.options)(urls=["x", "y"], more={"a": 1}, size=1 << 20)
    alone = load(tmp_path, code).options
    assert alone == type(alone)()
