"""Plugins of nbdkit: what is one, the order of its life, its sizes and abilities, and the guide's table of them."""

import ast
import errno
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.nbdkit.plugins import (
    FIRST_VERSION,
    FLUSHES,
    NEEDED,
    SIZE,
    WRITES,
    Plugin,
    calls,
    failure_of,
    opened,
    recorded_calls,
)
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import loader
from ublkpool.bufpool.sdk.backend import Properties
from ublkpool.bufpool.sdk.nbdkit import plugin as plugin_module
from ublkpool.bufpool.sdk.nbdkit.plugin import CALLBACKS, CALLBACKS_IGNORED, NbdkitBackend

GUIDE = Path(__file__).parents[2] / "docs" / "BACKENDS.md"
TESTS = sorted(Path(__file__).parent.glob("test_nbdkit_*.py"))


# What is a plugin.


@pytest.mark.parametrize(
    "code",
    [
        "import nbdkit\n",
        "from nbdkit import parse_size\n",
        "def config(key, value):\n    import nbdkit\n",
        "API_VERSION = 2\n",
        "API_VERSION: int = 1\n",
        "#!/usr/sbin/nbdkit python\n",
        "",
    ],
)
def test_a_plugin_is_recognised_by_its_text(plugin: Plugin, code: str) -> None:
    assert opened(plugin(code, FIRST_VERSION)).size_bytes == SIZE


@pytest.mark.parametrize(
    "code",
    [
        "def get_size(): return 4096\ndef pread(buf, offset): pass\n",
        "API_VERSION = '2024-11'\ndef get_size(): return 4096\ndef pread(buf, offset): pass\n",
        "from ublkpool.bufpool.sdk.backend import Backend\nAPI_VERSION = 2\nclass Mine(Backend): pass\n",
    ],
)
def test_a_backend_of_our_own_is_no_plugin(tmp_path: Path, code: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    assert not isinstance(loader.load(str(tmp_path / "mine.py"), {}), NbdkitBackend)


def test_a_plugin_runs_as_main_and_alone_has_the_module_nbdkit(plugin: Plugin) -> None:
    main, arguments = sys.modules["__main__"], sys.argv
    backend = plugin(
        NEEDED,
        "import sys\nassert sys.argv == ['']\n"
        "assert __name__ == '__main__' and __file__.endswith('plugin.py')\nimport __main__\n"
        "from dataclasses import dataclass\n@dataclass\nclass Row:\n    size: 'int' = 1\n"
        "assert __main__.Row is Row\n",
    )
    assert "nbdkit" in sys.modules
    opened(backend)
    backend.close()
    assert "nbdkit" not in sys.modules and sys.modules["__main__"] is main and sys.argv is arguments


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nbdkit\n", "callback open is missing"),
        (
            "API_VERSION = 3\ndef open(r): 1\ndef get_size(h): 1\ndef pread(h, b, o, f): 1\n",
            "API_VERSION is 3; there are",
        ),
        ("import nbdkit\n\n1 / 0\n", r"ZeroDivisionError: division by zero"),
        ("import nbdkit, sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("import nbdkit, no_such_module\n", "No module named 'no_such_module'"),
    ],
)
def test_a_file_that_is_no_whole_plugin_says_why(plugin: Plugin, code: str, said: str) -> None:
    main = sys.modules["__main__"]
    with pytest.raises(BackendError, match=said) as caught:
        plugin(code)
    assert "plugin.py" in str(caught.value) and "\n" not in str(caught.value)
    assert "nbdkit" not in sys.modules and sys.modules["__main__"] is main


def test_a_plugin_says_whether_its_data_dies_with_its_process(plugin: Plugin) -> None:
    assert plugin(NEEDED).survives_death
    assert not plugin(NEEDED, "survives_death = False\n").survives_death


# Parameters and the order of a life.


def test_config_gets_each_parameter_in_order(plugin: Plugin) -> None:
    code = "def config(key, value): calls.append((key, value))\n"
    plugin(NEEDED, code, **{"file": "/x", "free-form.key": "a=b", "script": ["y", "z"]})
    assert calls() == [("file", "/x"), ("free-form.key", "a=b"), ("script", "y"), ("script", "z")]


def test_without_config_a_parameter_is_an_error(plugin: Plugin) -> None:
    with pytest.raises(
        BackendError, match=r"unknown option colour=red: this plugin has no config\(key, value\)"
    ):
        plugin(NEEDED, colour="red")


@pytest.mark.parametrize("callback", ["config(key, value)", "config_complete()", "thread_model()"])
def test_a_failing_parameter_is_one_line_with_file_and_line(plugin: Plugin, callback: str) -> None:
    with pytest.raises(BackendError) as caught:
        plugin(
            "import nbdkit\n", f"def {callback}:\n    raise RuntimeError('no\\nway')\n", NEEDED, colour="red"
        ) if (callback.startswith("config(")) else plugin(
            "import nbdkit\n", f"def {callback}:\n    raise RuntimeError('no\\nway')\n", NEEDED
        )
    assert re.search(r"plugin\.py.*3.*RuntimeError: no way|RuntimeError: no way.*3", str(caught.value))
    assert "\n" not in str(caught.value)


def test_config_complete_follows_the_last_parameter(plugin: Plugin) -> None:
    code = "def config(key, value): calls.append(key)\ndef config_complete(): calls.append('complete')\n"
    plugin(NEEDED, code, a="1", b="2")
    assert calls() == ["a", "b", "complete"]


LIFE = """
def get_ready(): calls.append("get_ready")
def after_fork(): calls.append("after_fork")
def preconnect(readonly): calls.append(("preconnect", readonly))
def close(h): calls.append(("close", h["fd"]))
def cleanup(): calls.append("cleanup")
"""


@pytest.mark.parametrize("read_only", [False, True])
def test_get_ready_after_fork_and_preconnect_come_before_open_and_cleanup_after_close(
    plugin: Plugin, read_only: bool
) -> None:
    backend = plugin(NEEDED, LIFE)
    assert calls() == []
    opened(backend, read_only)
    assert calls() == ["get_ready", "after_fork", ("preconnect", read_only), ("open", read_only)]
    recorded = recorded_calls()
    backend.close()
    backend.close()
    assert recorded == [("close", 7), "cleanup"]


def test_what_was_opened_is_closed_if_the_next_step_fails(plugin: Plugin) -> None:
    backend = plugin(NEEDED, LIFE, "def get_size(h): raise OSError(5, 'no size')\n")
    recorded = recorded_calls()
    with pytest.raises(BackendError, match=r"no size \(get_size\)"):
        opened(backend)
    assert recorded[-2:] == [("close", 7), "cleanup"]


def test_a_failing_close_is_logged_and_cleanup_still_runs(
    plugin: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    backend = plugin(NEEDED, LIFE, "def close(h): raise RuntimeError('stuck')\n")
    opened(backend)
    recorded = recorded_calls()
    backend.close()
    assert recorded[-1] == "cleanup" and "RuntimeError: stuck" in caplog.text


def test_a_failing_open_says_the_plugins_own_words(plugin: Plugin) -> None:
    backend = plugin(NEEDED, "def open(readonly): raise RuntimeError('no such bucket')\n")
    with pytest.raises(BackendError, match=r"RuntimeError: no such bucket \(open\)"):
        opened(backend)


# Sizes and abilities.


@pytest.mark.parametrize("size", ["0", "-1", "'1M'", "1.5", "None"])
def test_a_get_size_that_is_no_size_is_refused(plugin: Plugin, size: str) -> None:
    with pytest.raises(BackendError, match=r"plugin.py: get_size\(\)"):
        opened(plugin(NEEDED, f"def get_size(h): return {size}\n"))


@pytest.mark.parametrize(
    ("answer", "logical", "physical"),
    [
        ("(0, 0, 0)", 512, 4096),
        ("(1, 512, 0xffffffff)", 512, 512),
        ("(4096, 65536, 1 << 20)", 4096, 65536),
        ("(512, 32 << 20, 32 << 20)", 512, 1 << 20),
    ],
)
def test_block_size_sets_the_blocks_of_the_disk(
    plugin: Plugin, answer: str, logical: int, physical: int
) -> None:
    properties = opened(plugin(NEEDED, f"def block_size(h): return {answer}\n"))
    assert (properties.logical_block_bytes, properties.physical_block_bytes) == (logical, physical)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("(3, 512, 4096)", "minimum must be a power of two"),
        ("(1, 256, 4096)", "preferred size must be"),
        ("(1, 1000, 4096)", "preferred size must be"),
        ("(512, 512, 1000)", "multiple of the minimum"),
        ("(1, 4096, 512)", "must not fall"),
        ("(65536, 65536, 65536)", "blocksize filter"),
        ("[1, 512, 512]", r"must be \(minimum, preferred, maximum\)"),
        ("(1, 512)", r"must be \(minimum, preferred, maximum\)"),
        ("(1, 512, None)", "must be a whole number"),
    ],
)
def test_a_block_size_that_no_disk_has_is_refused(plugin: Plugin, answer: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        opened(plugin(NEEDED, f"def block_size(h): return {answer}\n"))


def test_no_request_is_larger_than_the_maximum_of_block_size(plugin: Plugin) -> None:
    backend = plugin(NEEDED, WRITES, "def block_size(h): return (512, 1024, 4096)\n")
    opened(backend)
    calls()
    data = bytes(range(256)) * 40
    backend.pwrite(memoryview(data), 512, False)
    read = bytearray(len(data))
    backend.pread(memoryview(read), 512)
    assert read == data
    sizes = [(512, 3584), (4096, 4096), (8192, 2560)]
    made = [(name, length, offset, 0) for name in ("pwrite", "pread") for offset, length in sizes]
    assert calls() == made


@pytest.mark.parametrize(("answer", "rotational"), [("True", True), ("False", False), ("1", False)])
def test_is_rotational_is_told(plugin: Plugin, answer: str, rotational: bool) -> None:
    assert opened(plugin(NEEDED, f"def is_rotational(h): return {answer}\n")).rotational is rotational
    assert opened(plugin(NEEDED)).rotational is False


def test_without_can_callbacks_the_functions_decide(plugin: Plugin) -> None:
    bare = opened(plugin(NEEDED))
    assert bare.read_only and not bare.volatile_cache
    assert bare.discard_max_bytes == bare.write_zeroes_max_bytes == 0
    extra = "def trim(h, count, offset, flags): pass\ndef zero(h, count, offset, flags): pass\n"
    whole = opened(plugin(NEEDED, WRITES, FLUSHES, extra))
    assert not whole.read_only and whole.volatile_cache
    assert whole.discard_max_bytes > 0 and whole.write_zeroes_max_bytes > 0


@pytest.mark.parametrize(
    ("callback", "reads"),
    [
        ("can_write", lambda p: not p.read_only),
        ("can_flush", lambda p: p.volatile_cache),
        ("can_trim", lambda p: p.discard_max_bytes > 0),
        ("can_zero", lambda p: p.write_zeroes_max_bytes > 0),
    ],
)
def test_a_can_callback_overrules_the_function(
    plugin: Plugin, callback: str, reads: Callable[[Properties], bool]
) -> None:
    functions = "def trim(h, count, offset, flags): pass\ndef zero(h, count, offset, flags): pass\n"
    for answer, expected in (("True", True), ("False", False), ("1", False)):
        properties = opened(
            plugin(NEEDED, WRITES, FLUSHES, functions, f"def {callback}(h): return {answer}\n")
        )
        assert reads(properties) is expected


def test_a_read_only_device_asks_for_no_ability_to_change(plugin: Plugin) -> None:
    broken = "".join(f"def can_{each}(h): raise RuntimeError\n" for each in ("trim", "zero", "fua"))
    properties = opened(plugin(NEEDED, WRITES, broken), read_only=True)
    assert properties.read_only and properties.discard_max_bytes == 0


def test_a_read_only_plugin_refuses_writes(plugin: Plugin) -> None:
    backend = plugin(NEEDED, WRITES, "def can_write(h): return False\n")
    opened(backend)
    assert failure_of(lambda: backend.pwrite(memoryview(bytes(512)), 0, False)) == errno.EROFS


# The guide.


def documented() -> dict[str, str]:
    """Callback -> the test in the last column of the guide's table."""
    section = GUIDE.read_text().partition("## nbdkit's Python plugins")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if re.match(r"\| `\w+", line)]
    return {name: row[-2].strip(" `") for row in rows for name in re.findall(r"`(\w+)[(`]", row[1])}


def test_the_guide_names_every_callback_and_a_test_of_it() -> None:
    rows = documented()
    assert {*CALLBACKS, *CALLBACKS_IGNORED} <= set(rows)
    tests = set(re.findall(r"^def (test_\w+)", "".join(each.read_text() for each in TESTS), re.MULTILINE))
    assert set(rows.values()) <= tests


def test_every_callback_that_the_code_asks_for_is_listed() -> None:
    """The callbacks are string literals, the first argument of a few functions."""
    askers = {"has", "ask", "request", "_truth", "_request", "_call_if_defined"}
    asked = set()
    for node in ast.walk(ast.parse(inspect.getsource(plugin_module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in askers:
            asked |= {
                each.value
                for each in node.args[:2]
                if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
    asked |= {"get_ready", "after_fork"}
    assert asked == set(CALLBACKS) and not asked & set(CALLBACKS_IGNORED)
