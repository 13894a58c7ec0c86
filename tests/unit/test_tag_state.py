"""The tag's state machine: Python's table is the C core's, and it leads every request to its commit."""

from ublkpool.ublk import _native
from ublkpool.workers.tag_state import TRANSITIONS, Event, State

_lib = _native.lib


def test_states_and_events_have_the_numbers_of_the_c_enums() -> None:
    assert [getattr(_lib, f"UQ_{state.name}") for state in State] == list(State)
    assert [getattr(_lib, f"UQ_EV_{event.name}") for event in Event] == list(Event)
    assert (len(State), len(Event)) == (_lib.UQ_STATES, _lib.UQ_EVENTS)


def test_the_c_table_has_exactly_the_transitions_of_the_specification() -> None:
    illegal = 0xFF
    for state in State:
        for event in Event:
            expected = TRANSITIONS.get((state, event), illegal)
            assert _lib.uq_next_state(state, event) == expected, (state.name, event.name)


def test_from_every_state_that_the_kernel_does_not_hold_a_commit_can_be_reached() -> None:
    reaches = {State.COMMITTING}
    while grown := {s for (s, _), after in TRANSITIONS.items() if after in reaches} - reaches:
        reaches |= grown
    assert reaches >= set(State) - {State.GONE}


def test_a_write_that_waits_for_its_data_is_never_committed_before_a_copy() -> None:
    """After result 1 the driver accepts only NEED_GET_DATA."""
    for state in (State.WAIT_PLACE, State.PLACING):
        after = {follower for (before, _), follower in TRANSITIONS.items() if before is state}
        assert State.COMMITTING not in after
