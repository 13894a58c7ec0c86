"""The console output of a guest: cleans its bytes, finds the lines that must fail a run. Pure."""

import re

TAIL_LINES = 60
# The beginnings of the kernel's fault reports; ordinary lines that contain "bug" do not match.
COMPLAINTS = re.compile(
    r"\bWARNING: "
    r"|\bBUG: "
    r"|\bOops\b"
    r"|\bUBSAN: "
    r"|\bKernel panic - "
    r"|\bgeneral protection fault\b"
    r"|\binvalid opcode: "
    r"|\bunable to handle\b"
    r"|\bblocked for more than \d+ seconds"
    r"|\bstack-protector: "
    r"|\brefcount_t: "
    r"|\blist_(?:add|del) corruption"
)
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_a-z])|[\r\0]")


def clean(raw: bytes) -> str:
    """The console's text without the firmware's screen control."""
    return ESCAPES.sub("", raw.decode(errors="replace"))


def complaints(log: str) -> list[str]:
    """The lines in which the kernel reports a fault."""
    return [line for line in log.splitlines() if COMPLAINTS.search(line)]


def panicked(log: str) -> bool:
    """Whether the kernel panicked."""
    return "Kernel panic - " in log


def tail(log: str, lines: int = TAIL_LINES) -> str:
    """The last lines that are not empty."""
    return "\n".join([line for line in log.splitlines() if line.strip()][-lines:])
