"""On which line of a TOML text a key stands; `tomllib` does not tell.

Owns a scanner for text that `tomllib` has already accepted: it looks for keys only and skips values.  Must
not know what the keys mean.  A key path is a tuple of names and, in arrays, indexes: `("device", 0, "id")`.
"""

import re
import tomllib
from bisect import bisect_right

from ublkpool.daemon.settings.config import KeyPath

_STRING = re.compile(r'''"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\])*"|'[^']*\'''', re.DOTALL)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_SCALAR = re.compile(r"[^,\]}#\n]+")


class KeyLines:
    """The keys of one TOML text and their lines, counted from 1."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._array_lengths: dict[KeyPath, int] = {}
        self._lines: dict[KeyPath, int] = {}
        self._scan_document()

    def line_of(self, path: KeyPath) -> int:
        """The line of this key or, where it is not written, of the table around it; 1 for the document."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def _scan_document(self) -> None:
        table: KeyPath = ()
        while self._skip(_BLANK) < len(self._text):
            if self._text[self._at] == "[":
                table = self._scan_header()
            else:
                self._scan_pair(table)

    def _scan_header(self) -> KeyPath:
        line = self._line()
        is_array = self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        names = self._scan_key()
        self._at += 2 if is_array else 1
        path = self._current(names[:-1])
        path = self._append_table((*path, names[-1])) if is_array else self._current(names)
        self._note(path, line)
        return path

    def _append_table(self, array: KeyPath) -> KeyPath:
        index = self._array_lengths.get(array, 0)
        self._array_lengths[array] = index + 1
        return (*array, index)

    def _current(self, names: list[str]) -> KeyPath:
        """What a header's names mean here: through an array of tables they go to its last element."""
        path: KeyPath = ()
        for name in names:
            path = (*path, name)
            if path in self._array_lengths:
                path = (*path, self._array_lengths[path] - 1)
        return path

    def _scan_pair(self, table: KeyPath) -> None:
        line = self._line()
        path = (*table, *self._scan_key())
        self._note(path, line)
        self._at += 1
        self._skip(_SPACE)
        self._scan_value(path)

    def _scan_key(self) -> list[str]:
        """A dotted key; stops at whatever follows it."""
        names = []
        while True:
            self._skip(_SPACE)
            names.append(self._scan_name())
            self._skip(_SPACE)
            if self._text[self._at] != ".":
                return names
            self._at += 1

    def _scan_name(self) -> str:
        if self._text[self._at] in "\"'":
            token = self._take(_STRING)
            return str(tomllib.loads(f"name = {token}")["name"])
        return self._take(_BARE_KEY)

    def _scan_value(self, path: KeyPath) -> None:
        first = self._text[self._at]
        if first == "[":
            self._scan_array(path)
        elif first == "{":
            self._scan_inline_table(path)
        else:
            self._take(_STRING if first in "\"'" else _SCALAR)

    def _scan_array(self, path: KeyPath) -> None:
        index = 0
        while self._next_item("]"):
            self._note((*path, index), self._line())
            self._scan_value((*path, index))
            index += 1

    def _scan_inline_table(self, path: KeyPath) -> None:
        while self._next_item("}"):
            self._scan_pair(path)

    def _next_item(self, end: str) -> bool:
        """Step over the opening bracket or a comma; False once past the closing bracket."""
        self._skip(_BLANK)
        if self._text[self._at] != end:
            self._at += 1
            self._skip(_BLANK)
        if self._text[self._at] != end:
            return True
        self._at += 1
        return False

    def _note(self, path: KeyPath, line: int) -> None:
        """Keep the first line that mentions this path or a table around it."""
        for length in range(1, len(path) + 1):
            self._lines.setdefault(path[:length], line)

    def _line(self) -> int:
        return bisect_right(self._newlines, self._at) + 1

    def _skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._at

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(f"not TOML at line {self._line()}")
        self._at = match.end()
        return match.group()
