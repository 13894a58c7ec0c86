"""What the documentation names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TEST = re.compile(r"`(tests/[a-z/_0-9]+\.py)::(\w+)`")


def test_every_test_that_the_operations_guide_names_exists() -> None:
    named = _TEST.findall((ROOT / "docs" / "OPERATIONS.md").read_text())
    assert len(named) > 15
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert missing == []
