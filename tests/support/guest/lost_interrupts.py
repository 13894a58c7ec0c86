"""Interrupts whose end QEMU has lost, found in what its monitor says of the CPUs' local APICs.  Pure.

QEMU 10.0 without KVM was seen to leave a vector in service that no handler ran for: the timer's (236), of CPU 0.  The
CPU then takes no interrupt of that priority or a lower one: its timers never fire, a task that sleeps on it sleeps for
ever, and RCU says "kthread timer wakeup didn't happen".  No CPU that works has one vector in service for half a minute.
"""

import re

ASK_EVERY_S = 5.0
ANSWERS = 6
"""As many answers in a row as must name a vector before it counts as lost."""
_STATE = re.compile(r"dumping local APIC state for CPU (\d+).*?\bISR\s+([^\r\n]*)", re.DOTALL)


def question(cpus: int) -> str:
    """What to send to the monitor."""
    return "".join(f"info lapic {cpu}\n" for cpu in range(cpus))


class InService:
    """The vectors that each CPU has in service, answer after answer."""

    def __init__(self) -> None:
        self._said = ""
        self._vectors: dict[str, set[str]] = {}
        self._answers: dict[str, int] = {}

    def hear(self, text: str) -> None:
        """Take a piece of the monitor's output."""
        self._said += text
        end = 0
        for state in _STATE.finditer(self._said):
            # The rest of an unfinished line may still come.
            if state.end() == len(self._said):
                break
            self._count(state[1], {each for each in state[2].split() if each.isdigit()})
            end = state.end()
        self._said = self._said[end:]

    def _count(self, cpu: str, vectors: set[str]) -> None:
        lasting = vectors & self._vectors.get(cpu, set())
        self._answers[cpu] = self._answers.get(cpu, 0) + 1 if lasting else 1
        self._vectors[cpu] = lasting or vectors

    @property
    def lost(self) -> str:
        """Which CPU has which vector in service for ever; empty if none."""
        for cpu, vectors in self._vectors.items():
            if vectors and self._answers[cpu] >= ANSWERS:
                return f"CPU {cpu} has interrupt {min(vectors)} in service without end"
        return ""
