"""The check, from the kernel's trace, that requests end in the order in which they began."""

from support.vm.bpftrace_shim import out_of_order


def begins(sector: int, kind: str = "W") -> str:
    about = "fio-12      [000] ..... 16.1: block_io_start: 259,0"
    return f"{about} {kind} 4096 () {sector} + 8 none,0,0 [fio]"


def ends(sector: int, kind: str = "W") -> str:
    about = "ublkpool-w-9 [001] ..... 16.2: block_rq_complete: 259,0"
    return f"{about} {kind} () {sector} + 8 none,0,0 [0]"


def test_requests_that_end_in_order_are_not_reported() -> None:
    lines = ["# tracer: nop", begins(0), begins(8), ends(0), begins(16, "WS"), ends(8), ends(16, "WS")]
    assert list(out_of_order(lines, "W")) == []


def test_a_request_that_overtakes_another_is_reported() -> None:
    lines = [begins(0), begins(8), begins(16), ends(0), ends(16), ends(8)]
    assert list(out_of_order(lines, "W")) == [
        "out_of_order: sector 16 started at seq 3 but completed at seq 2",
        "out_of_order: sector 8 started at seq 2 but completed at seq 3",
    ]


def test_other_operations_and_requests_with_an_untraced_start_are_left_out() -> None:
    lines = [ends(0), begins(0, "R"), begins(8), begins(16), ends(0, "R"), ends(8), ends(16)]
    assert list(out_of_order(lines, "W")) == []


def test_a_trace_without_a_request_says_so() -> None:
    assert list(out_of_order([begins(0), ends(0, "R")], "W")) == ["out_of_order: no request was seen to end"]
