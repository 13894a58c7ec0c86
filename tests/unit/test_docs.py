"""Every name that the documentation mentions exists, and so does every log line that it quotes."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

from support.documented_names import Repository
from ublkpool.daemon.metrics.families import FAMILIES

ROOT = Path(__file__).parents[2]
REPOSITORY = Repository(ROOT)
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
    "bench/README.md",
)
KERNEL = (
    "UBLK_IO_F_SHMEM_ZC __ublk_complete_rq alloc_file bd_prepare_to_claim bdev_open bdi blk_mq_freeze_queue_wait "
    "canceling check_conflicting_open deny drivers/block/ublk_drv.c errno_to_blk_status fuse_encode_fh "
    "get_user_pages_fast holders/ i_generation io_req_caches_free io_uring_cmd_complete_in_task "
    "kernel.io_uring_disabled limits_lock locks_translate_pid loop_info64 memory.max open_mutex "
    "populate_vma_page_range process_vm_writev queue_limits_commit_update_frozen schedule shmem_enabled "
    "sk_getsockopt smaps_rollup st_dev sun_path try_to_wake_up ublk_cancel_dev ublk_cdev_rel ublk_get_data "
    "fs.suid_dumpable no_new_privs ublk_lock_buf_tree ublk_mark_io_ready ublk_partition_scan_work "
    "ublk_queue_reinit ublks_max ublksrv_flags vm.nr_hugepages write_iter"
)
"""Functions, fields, files and settings of the kernel: its source is not here."""
SYSTEM = (
    "CancelledError DEALER F_SEAL_GROW F_SEAL_SEAL IORING_OP_FUTEX_WAIT MADV_DONTNEED SCM_RIGHTS SOCK_SEQPACKET "
    "SOCK_STREAM "
    "SO_PEERCRED ZMQ_ROUTING_ID _netdev cat cmpxchg16b coredumpctl "
    "debug_ms debug_objecter debug_rbd df dmesg erms final.target fsck fsrm "
    "h11.RemoteProtocolError hidepid io_uring_prep_uring_cmd liburing.a mkfs modules.dep ms_crc_data nofail nowatch "
    "numactl "
    "osd_client_watch_timeout osd_request_timeout preexec_fn ps rados_mon_op_timeout "
    "rados_osd_op_timeout rbd_enable_alloc_hint rbd_config_image_list rbd_lock_acquire sources.list taskset "
    "tools/testing/selftests/ublk umount.target xfs_growfs"
)
"""Names of libraries, programs, systemd and processors."""
PLACEHOLDERS = (
    "FILE.py KIND RUN_DIR.state bench/out BIT_n events.jsonl events.old.jsonl memory.NAME ipc://... mycache "
    "speed-exact-7.3.json"
)
"""What stands for a name that the reader chooses, or that a run makes."""
PEERS = "ublk_recover_disk kublk nbdublk --reattach-timeout --exclusive --io-timeout"
"""Names of the programs that the README and the benchmark compare with."""
METRICS = frozenset(each.exposed for each in FAMILIES)
ALLOWED = METRICS | frozenset(f"{KERNEL} {SYSTEM} {PLACEHOLDERS} {PEERS}".split())
CODE = ("bufpool", "backends", "daemon", "workers", "ublk", "examples", "tests")
_VARIABLE = re.compile(
    r"\.\.\.|\bvol[01]\b|/[\w./-]+|\bublkpool-\S*|[\d.]+|\bN\b|\bSIGKILL\b|\bfile\b|[:;()]|\bbackends?\b"
    r"|[A-Z]+_DEV|\bthe (?:pool broker|holder)\b"
)
"""What differs from one log line to the next: names, numbers, paths; and where a line may be put together."""
_WORDS_MIN = 2


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_in_a_document_exists(document: str) -> None:
    assert REPOSITORY.unknown((ROOT / document).read_text(), ALLOWED) == []


def test_every_name_in_the_comments_of_the_config_exists() -> None:
    assert REPOSITORY.unknown((ROOT / "config" / "ublkpool.toml").read_text(), ALLOWED) == []


@pytest.mark.parametrize("folder", CODE)
def test_every_name_in_a_docstring_exists(folder: str) -> None:
    assert REPOSITORY.unknown_in_docstrings(folder, ALLOWED) == {}


@pytest.mark.parametrize(
    "false",
    [
        "daemon/device/heir.py",
        "no_such_module.py",
        "tests/unit/test_docs.py::test_nothing_of_this_name",
        "daemon/cli/shutdown.py: no_such_function",
        "test_nothing_of_this_name",
        "Arena.no_such_method",
        "ublkpool.bufpool.sdk.no_such_module",
        "uq_no_such_function",
        "harvest > uq_no_such_function",
        "NoSuchClass",
        "--no-such-option",
        "make no-such-target",
        "no_such_key",
        "os.no_such_call",
    ],
)
def test_a_false_name_is_found(false: str) -> None:
    assert REPOSITORY.unknown(f"A text with `{false}` in it.", ALLOWED) != []


@pytest.mark.parametrize(
    "true",
    [
        "daemon/device/device.py",
        "device.py",
        "tests/unit/test_docs.py::test_a_true_name_is_not_found",
        "daemon/cli/shutdown.py: begin",
        "Arena.create",
        "ublkpool.bufpool.sdk.claim.open_alone",
        "uq_complete > arrive",
        "--on-stop",
        "make test",
        "make soak DURATION=600",
        "io_timeout",
        "os._exit",
        "PR_SET_IO_FLUSHER",
    ],
)
def test_a_true_name_is_not_found(true: str) -> None:
    assert REPOSITORY.unknown(f"A text with `{true}` in it.") == []


def test_every_log_line_that_the_operations_guide_quotes_is_in_the_code() -> None:
    lines = _quoted_lines((ROOT / "docs" / "OPERATIONS.md").read_text())
    assert len(lines) > 25
    assert _not_said(lines) == []


def test_a_log_line_that_no_code_says_is_found() -> None:
    assert _not_said(["vol0: backend file went away and nothing waits"]) != []


def _quoted_lines(guide: str) -> list[str]:
    """The log lines in the first column of the table below "What the log says"."""
    section = guide.partition("## What the log says\n")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    return [line for cell in cells for line in re.findall(r"`([^`]+)`", cell)]


def _not_said(lines: list[str]) -> list[str]:
    """The pieces of these lines, of some words each, that are in no string of the code."""
    said = "\n".join(_strings())
    pieces = (piece.strip(" ,=") for line in lines for piece in _VARIABLE.split(line))
    return [piece for piece in pieces if len(piece.split()) >= _WORDS_MIN and piece not in said]


def _strings() -> list[str]:
    """Every string of the code that writes log lines."""
    sources = [
        path
        for folder in ("daemon", "workers", "bufpool", "backends")
        for path in (ROOT / folder).rglob("*.py")
    ]
    nodes = (node for path in sources for node in ast.walk(ast.parse(path.read_text())))
    native = [path.read_text() for path in (ROOT / "ublk" / "csrc").glob("*.c")]
    return [*(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)), *native]


def test_the_way_of_a_write_names_functions_that_call_each_other() -> None:
    guide = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    section = guide.partition("## A write, function by function\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|[^|]*\| `([\w/.]+)` \| ([^|]*) \|$", section, re.MULTILINE)
    assert len(rows) > 25
    chains = [(file, re.findall(r"`(\w+)`", chain)) for file, cell in rows for chain in cell.split(";")]
    assert [missing for file, chain in chains for missing in _not_called(file, chain)] == []


def _not_called(file: str, chain: list[str]) -> list[str]:
    """The functions of a chain that the C file does not define, or that the one before does not name."""
    text = (ROOT / file).read_text()
    bodies = {name: _body(text, name) for name in chain}
    undefined = [f"{file}: {name}" for name in chain[:-1] if not bodies[name]]
    pairs = pairwise(chain)
    return undefined + [f"{file}: {a} > {b}" for a, b in pairs if not re.search(rf"\b{b}\b", bodies[a])]


def _body(text: str, name: str) -> str:
    """What stands between the braces of this function's definition; empty if there is none."""
    found = re.search(
        rf"^\S[^;{{}}#]*\b{name}\([^;{{}}]*\)\s*{{([^\n]+}}$|.*?^}})", text, re.MULTILINE | re.DOTALL
    )
    return found[1] if found else ""
