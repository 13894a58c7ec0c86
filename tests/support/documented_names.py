"""Reads the repository's names, and says which names in a text are none of them.

Owns the rules: what in backticks counts as a name, and where a name may be defined.  Knows no document; used by
`tests/unit/test_docs.py`.  Pure but for reading the files of the repository.
"""

import ast
import builtins
import importlib
import itertools
import keyword
import os
import re
import shlex
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

_FOLDERS = (
    "backends",
    "bench",
    "bufpool",
    "config",
    "daemon",
    "docs",
    "examples",
    "packaging",
    "tests",
    "ublk",
    "workers",
)
_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(_FOLDERS)})/[\w/.-]*\w/?")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_RST_SPAN = re.compile(r"``[^`]+``")
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?: {4}|\t).*$", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_]\w*")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_OPTION = re.compile(r"--[a-z][a-z-]*")
_FILE_NAME = re.compile(r"[\w@.-]+\.(?:py|pyi|c|h|md|toml|service|rules|sh|json)")
_MODULE_AND_NAME = re.compile(r"((?:\w+/)*(\w+)\.py)(?:: |::)(\w+)")
_MAKE_TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
_MAKE_VARIABLE = re.compile(r"\b([A-Z][A-Z_]+)\b")
_PLACES = ("RUN_DIR", "STATE_DIR")
_LIBRARIES = frozenset((*sys.stdlib_module_names, "click", "msgspec", "zmq"))
_PYTHON = frozenset((*dir(builtins), *dir(os), *keyword.kwlist))
_CONFIG_KEY = re.compile(r"^#?\s*([a-z_]+) = ", re.MULTILINE)


class Repository:
    """Everything in a checkout that a document may name."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @cached_property
    def files(self) -> frozenset[str]:
        """Every file, as a path from the root, but what was built."""
        found = (path for folder in _FOLDERS for path in (self._root / folder).rglob("*"))
        inside = (path for path in found if path.is_file() and "__pycache__" not in path.parts)
        top = (path for path in self._root.iterdir() if path.is_file())
        return frozenset(str(path.relative_to(self._root)) for path in (*inside, *top))

    @cached_property
    def folders(self) -> frozenset[str]:
        """Every folder that has a file, as a path from the root."""
        return frozenset(str(parent) for file in self.files for parent in Path(file).parents)

    @cached_property
    def _trees(self) -> dict[str, ast.Module]:
        sources = [file for file in self.files if file.endswith((".py", ".pyi"))]
        return {file: ast.parse((self._root / file).read_text()) for file in sources}

    @cached_property
    def _members(self) -> dict[str, frozenset[str]]:
        """The names defined directly in each class and each module; a class has those of its bases as well."""
        own: dict[str, set[str]] = defaultdict(set)
        bases: dict[str, set[str]] = defaultdict(set)
        for file, tree in self._trees.items():
            own[Path(file).stem] |= set(_defined(tree))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    own[node.name] |= set(_defined(node)) | set(_attributes(node))
                    bases[node.name] |= {each.id for each in node.bases if isinstance(each, ast.Name)}
        for folder in map(Path, self.folders):
            inside = (Path(each) for each in (*self.folders, *self._trees))
            own[folder.name] |= {each.stem for each in inside if each.parent == folder}
            if f"{folder}/__init__.py" in self._trees:
                own[folder.name] |= set(_defined(self._trees[f"{folder}/__init__.py"]))
        return {name: frozenset(_inherited(name, own, bases)) for name in own}

    @cached_property
    def names(self) -> frozenset[str]:
        """Every identifier that Python or C code of the repository defines, and every string that is one word."""
        return self._python_names | self._c_words | self._settings | _PYTHON

    @cached_property
    def _python_names(self) -> frozenset[str]:
        found = set(self._members)
        for file, tree in self._trees.items():
            for node in ast.walk(tree):
                found |= set(_names_of(node))
                # Not those of tests: one that plants a false name would make it true.
                if _is_word(node) and not file.startswith("tests/unit/"):
                    found.add(str(node.value))
        return frozenset(found)

    @cached_property
    def _c_words(self) -> frozenset[str]:
        sources = [file for file in self.files if file.endswith((".c", ".h"))]
        texts = (_COMMENT.sub(" ", (self._root / file).read_text()) for file in sources)
        return frozenset(word for text in texts for word in _WORD.findall(text))

    @cached_property
    def _settings(self) -> frozenset[str]:
        """Config keys, make targets and make variables."""
        makefile = (self._root / "Makefile").read_text()
        config = (self._root / "config" / "ublkpool.toml").read_text()
        return frozenset((*_MAKE_VARIABLE.findall(makefile), *_CONFIG_KEY.findall(config)))

    @cached_property
    def _installed(self) -> frozenset[str]:
        """Folders and programs that an installation makes, relative to its prefix."""
        project = tomllib.loads((self._root / "pyproject.toml").read_text())
        data = project["tool"]["setuptools"]["data-files"]
        return frozenset((*data, *(f"bin/{name}" for name in project["project"]["scripts"])))

    @cached_property
    def targets(self) -> frozenset[str]:
        """What `make` can make."""
        return frozenset(_MAKE_TARGET.findall((self._root / "Makefile").read_text()))

    @cached_property
    def options(self) -> frozenset[str]:
        """Every command-line option that a program of the repository takes."""
        trees = (tree for file, tree in self._trees.items() if not file.startswith("tests/unit/"))
        nodes = (node for tree in trees for node in ast.walk(tree))
        strings = (
            node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        return frozenset(option for text in strings for option in _OPTION.findall(text))

    def unknown(self, text: str, allowed: Iterable[str] = ()) -> list[str]:
        """The names in a Markdown text that are neither in the repository nor `allowed`, in order."""
        allow = frozenset(allowed)
        prose = _INDENTED.sub("", _FENCED.sub("", text))
        found = [path for path in _PATH.findall(text) if path not in allow and not self._has_path(path)]
        for span in _SPAN.findall(prose):
            if span not in allow:
                found += [name for name in self._unknown_in(span) if name not in allow]
        return list(dict.fromkeys(found))

    def unknown_in_docstrings(self, folder: str, allowed: Iterable[str] = ()) -> dict[str, list[str]]:
        """For each Python file below `folder`, the names in its docstrings that are not in the repository."""
        found: dict[str, list[str]] = {}
        for file, tree in sorted(self._trees.items()):
            if file.startswith(f"{folder}/"):
                texts = [_RST_SPAN.sub("", text) for text in _docstrings(tree)]
                names = [name for text in texts for name in self.unknown(_unindented(text), allowed)]
                if names:
                    found[file] = names
        return found

    def _unknown_in(self, span: str) -> Iterator[str]:
        words = shlex.split(span) if span.startswith("make ") else span.split()
        if of_module := _MODULE_AND_NAME.fullmatch(span):
            yield from self._unknown_word(of_module[1], is_command=False)
            if of_module[3] not in self._members.get(of_module[2], ()):
                yield span
        elif words[0] == "make" and len(words) > 1:
            yield from self._unknown_in_make(words[1:])
        elif len(words) > 1:
            for word in words:
                yield from self._unknown_word(word.strip("(),:;'\""), is_command=True)
        else:
            yield from self._unknown_word(span.strip("(),:;"), is_command=False)

    def _unknown_in_make(self, words: list[str]) -> Iterator[str]:
        for word in words:
            name = word.partition("=")[0]
            if name not in (self._settings if "=" in word else self.targets):
                yield f"make {word}"

    def _unknown_word(self, word: str, is_command: bool) -> Iterator[str]:
        """The word, if it is a name and no such name is there.  Of a command only what is certainly ours counts."""
        if word.startswith("--"):
            known = word.partition("=")[0] in self.options or is_command
        elif "/" in word:
            known = self._has_path(word) or _is_elsewhere(word) or is_command
        elif _FILE_NAME.fullmatch(word):
            known = is_command or self._has_path(word)
        elif _DOTTED.fullmatch(word):
            known = self._has_dotted(word) or _is_library(word) or is_command
        elif word.startswith("test_"):
            known = word in self._python_names
        elif _WORD.fullmatch(word):
            known = word in self.names or (is_command and "_" not in word)
        else:
            known = True
        if not known:
            yield word

    def _has_path(self, path: str) -> bool:
        """Whether a file or folder has this path, or a path that ends with it."""
        bare = path.rstrip("/")
        if bare in self._installed:
            return True
        if "*" in bare:
            return any(Path(file).match(bare) for file in self.files)
        return any(each == bare or each.endswith(f"/{bare}") for each in (*self.files, *self.folders))

    def _has_dotted(self, name: str) -> bool:
        """Whether each part is a member of the class, module or package before it; of a value, any name."""
        parts = [part for part in name.split(".") if part != "ublkpool"]
        if parts[-1] in self._settings:
            return True
        pairs = itertools.pairwise(parts)
        return all(
            last in self._members.get(owner, self.names) and owner in self.names for owner, last in pairs
        )


def _is_elsewhere(path: str) -> bool:
    """Whether a path is absolute, or below a directory of the running daemon."""
    return path.startswith(("/", "~", "$")) or path.partition("/")[0] in _PLACES


def _is_library(name: str) -> bool:
    """Whether this is something of Python's library, or of one that the project requires."""
    module, *rest = name.split(".")
    if module not in _LIBRARIES:
        return False
    found: object = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        if not hasattr(found, part):
            try:
                found = importlib.import_module(module)
            except ImportError:
                return False
        else:
            found = getattr(found, part)
    return True


def _inherited(name: str, own: dict[str, set[str]], bases: dict[str, set[str]]) -> set[str]:
    found, todo, seen = set[str](), [name], set[str]()
    while todo:
        each = todo.pop()
        if each not in seen:
            seen.add(each)
            found |= own.get(each, set())
            todo += bases.get(each, set())
    return found


def _defined(scope: ast.Module | ast.ClassDef) -> Iterator[str]:
    """What a module or a class defines directly; what a module imports belongs to it, too."""
    for node in ast.walk(scope) if isinstance(scope, ast.Module) else scope.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (
                each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)
            )
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.asname or alias.name for alias in node.names)


def _attributes(scope: ast.ClassDef) -> Iterator[str]:
    """What its methods set on `self`."""
    for node in ast.walk(scope):
        is_own = (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        )
        if is_own and isinstance(node, ast.Attribute):
            yield node.attr


def _names_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.alias):
        yield from node.name.split(".")


def _is_word(node: ast.AST) -> TypeGuard[ast.Constant]:
    return (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(_WORD.fullmatch(node.value))
    )


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings, and the strings below a field that describe it."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value.value


def _unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())
