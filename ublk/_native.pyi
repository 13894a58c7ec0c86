"""What the compiled module exports; its C declarations are the headers in csrc/, its typed face is queue.py."""

from typing import Any

ffi: Any
lib: Any
