"""The tag's state machine: Python's table is the C core's, and it leads every request to its commit."""

from ublkpool.ublk import _native
from ublkpool.workers.tag_state import TRANSITIONS, Event, State

_lib = _native.lib
ILLEGAL = 0xFF


def followers_in_the_core(state: State) -> set[State]:
    """The states that the C core's table leads to from this one."""
    return {State(after) for event in Event if (after := _lib.uq_next_state(state, event)) != ILLEGAL}


def test_states_and_events_have_the_numbers_of_the_c_enums() -> None:
    assert [getattr(_lib, f"UQ_{state.name}") for state in State] == list(State)
    assert [getattr(_lib, f"UQ_EV_{event.name}") for event in Event] == list(Event)
    assert (len(State), len(Event)) == (_lib.UQ_STATES, _lib.UQ_EVENTS)


def test_the_c_table_has_exactly_the_transitions_of_the_specification() -> None:
    for state in State:
        for event in Event:
            expected = TRANSITIONS.get((state, event), ILLEGAL)
            assert _lib.uq_next_state(state, event) == expected, (state.name, event.name)


def test_in_the_core_a_commit_can_be_reached_from_every_state_that_the_kernel_does_not_hold() -> None:
    reaches = {State.COMMITTING}
    while grown := {s for s in State if reaches & followers_in_the_core(s)} - reaches:
        reaches |= grown
    assert reaches == set(State) - {State.GONE}


def test_the_core_never_commits_a_write_that_waits_for_its_data_before_a_copy() -> None:
    """After result 1 the driver accepts only NEED_GET_DATA."""
    for state in (State.WAIT_PLACE, State.PLACING):
        assert State.COMMITTING not in followers_in_the_core(state)
