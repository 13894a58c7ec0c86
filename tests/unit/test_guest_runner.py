"""The test guest's pure parts: apt's configuration, archive indexes, the environment, the console."""

import hashlib
import platform
import re
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

from support.guest import __main__ as guest
from support.guest import apt_archive, tsc
from support.guest import boot as guest_boot
from support.guest import cache as guest_cache
from support.guest import console as guest_console
from support.guest.cache import CacheError, Emulator
from support.guest.qemu import Spec, qemu_command

DEB822 = """\
# comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm
  bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main
"""

PACKAGES = """\
Package: linux-image-6.12.94+deb13-cloud-amd64
Version: 6.12.94-1
Filename: pool/a_6.12.94-1_amd64.deb
Size: 10
Description: a kernel
 more of it
SHA256: aa

Package: linux-image-6.12.107+deb13-cloud-amd64
Version: 6.12.107-1
Filename: pool/a_6.12.107-1_amd64.deb
Size: 11
SHA256: bb

Package: linux-image-6.12.107+deb13-cloud-amd64-dbg
Version: 6.12.107-1
Filename: pool/dbg.deb
Size: 12
SHA256: cc
"""


def test_deb822_sources_are_read_with_continuations_and_without_disabled_ones() -> None:
    assert apt_archive.parse_deb822(DEB822) == [
        apt_archive.Source(
            ("http://mirror.example/debian",), ("bookworm", "bookworm-updates"), ("main", "contrib")
        )
    ]


def test_one_line_sources_are_read_with_options_and_comments() -> None:
    text = (
        "# deb http://no.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib # why\n"
        "deb-src http://source.example/debian bookworm main\n"
    )
    assert apt_archive.parse_one_line(text) == [
        apt_archive.Source(("http://mirror.example/debian",), ("bookworm",), ("main", "contrib"))
    ]


def test_both_kinds_of_source_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://one.example/debian bookworm main\n")
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    uris = [uri for source in apt_archive.read_sources(tmp_path) for uri in source.uris]
    assert uris == ["http://one.example/debian", "http://mirror.example/debian"]


def test_mirrors_of_other_repositories_are_left_out(tmp_path: Path) -> None:
    listed = tmp_path / "mirrors"
    listed.write_text("# comment\nhttps://listed.example/debian/ priority:1\n")
    sources = [
        apt_archive.Source(("http://vendor.example/apt",), ("bookworm",), ("stable",)),
        apt_archive.Source(("http://cloud.example/apt",), ("cloud-sdk-bookworm",), ("main",)),
        apt_archive.Source((f"mirror+file://{listed}", "cdrom:[x]/"), ("bookworm",), ("main",)),
        apt_archive.Source(("http://mirror.example/debian/",), ("stable",), ("main",)),
    ]
    assert apt_archive.candidate_mirrors(sources, "bookworm") == [
        "https://listed.example/debian",
        "http://mirror.example/debian",
    ]


def test_the_newest_kernel_is_chosen_by_number_and_by_whole_name() -> None:
    wanted = re.compile(guest_cache.PARTS["kernel-6.12"][0].pattern)
    found = sorted(apt_archive.parse_packages(PACKAGES, wanted), key=apt_archive.Package.age_key)
    assert [package.version for package in found] == ["6.12.94-1", "6.12.107-1"]
    assert found[-1].sha256 == "bb"
    assert found[-1].size_bytes == 11


def test_only_sha256_digests_of_a_release_are_used() -> None:
    text = "Suite: stable\nMD5Sum:\n 00 5 main/p.xz\nSHA256:\n ab 5 main/p.xz\n cd 6 main/q.xz\n"
    assert apt_archive.parse_release_hashes(text) == {"main/p.xz": "ab", "main/q.xz": "cd"}
    with pytest.raises(apt_archive.ArchiveError):
        apt_archive.parse_release_hashes("MD5Sum:\n 00 5 main/p.xz\n")


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> apt_archive.Archive:
    """An archive on this disk without a signature."""
    monkeypatch.setattr(apt_archive, "DOWNLOAD_ATTEMPTS_MAX", 1)
    monkeypatch.setattr("time.sleep", lambda _: None)
    suite = tmp_path / "dists" / "trixie"
    suite.mkdir(parents=True)
    (suite / "InRelease").write_text("SHA256:\n ab 5 main/binary-amd64/Packages.xz\n")
    (tmp_path / "x.deb").write_bytes(b"contents")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return apt_archive.Archive([tmp_path.as_uri()], scratch)


def test_an_unsigned_release_is_refused(mirror: apt_archive.Archive) -> None:
    with pytest.raises(apt_archive.ArchiveError, match="bad signature"):
        mirror.newest("trixie", "linux-image")


def test_a_package_is_kept_only_with_the_promised_digest(mirror: apt_archive.Archive) -> None:
    true_digest = hashlib.sha256(b"contents").hexdigest()
    downloaded = mirror.download(apt_archive.Package("x", "1", "x.deb", 8, true_digest))
    assert downloaded.read_bytes() == b"contents"
    with pytest.raises(apt_archive.ArchiveError, match="SHA256"):
        mirror.download(apt_archive.Package("x", "1", "x.deb", 8, "0" * 64))
    assert not downloaded.exists()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ('ID=debian\nVERSION_ID="12"\n', 12),
        ('PRETTY_NAME="Debian GNU/Linux forky/sid"\nID=debian\n', 999),
        ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n', 0),
    ],
)
def test_the_debian_version_is_read(text: str, version: int) -> None:
    assert guest_cache.debian_version(text) == version


@pytest.mark.parametrize(
    "line",
    [
        "[   12.0] WARNING: CPU: 1 PID: 7 at drivers/block/ublk_drv.c:1 ublk_io+0x1/0x2",
        "[   12.0] BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "[   12.0] Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI",
        "[  243.1] INFO: task fio:77 blocked for more than 120 seconds.",
        "[    6.0] Kernel panic - not syncing: sysrq triggered crash",
    ],
)
def test_the_kernels_complaints_are_seen(line: str) -> None:
    assert guest_console.complaints(f"[  1.0] all well\n{line}\n[  2.0] on it goes\n") == [line]


def test_ordinary_console_lines_are_no_complaints() -> None:
    log = "test: tests/vm/test_debugging.py::test_warnings\nBuffer I/O error on dev ublkb0\nnbd: debug off\n"
    assert guest_console.complaints(log) == []
    assert not guest_console.panicked(log)


def test_the_firmwares_screen_control_is_removed() -> None:
    assert (
        guest_console.clean(b"\x1bc\x1b[?7l\x1b[2JSeaBIOS\r\n[ 1.0] x\xff\r\n") == "SeaBIOS\n[ 1.0] x\ufffd\n"
    )


def test_the_tail_keeps_lines_that_are_not_empty() -> None:
    assert guest_console.tail("a\n\nb\n  \nc\n", 2) == "b\nc"


@pytest.mark.parametrize(
    ("line", "status"), [("exit 0", 0), ("exit 139", 139), ("beat", None), ("exit x", None)]
)
def test_the_commands_status_is_read_from_the_control_port(line: str, status: int | None) -> None:
    assert guest_boot.parse_status(line) == status


def test_bash_reads_arrays_back_word_for_word() -> None:
    words = ["plain", "two words", "it's", '$HOME `id` "x"', "", "a\nb"]
    script = guest_boot.bash_array("A", words) + 'printf "%s\\0" "${A[@]}"'
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split("\0")[:-1] == words


def test_the_environment_is_passed_selectively(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBLKPOOL_SEED", "7")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    passed = guest_boot.guest_environment("7.3", Path("/modules"))
    assert passed["UBLKPOOL_SEED"] == "7"
    assert passed["UBLKPOOL_GUEST"] == "7.3"
    assert "SECRET_TOKEN" not in passed


def test_only_the_command_of_an_exact_guest_has_the_variable_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBLKPOOL_EXACT", "1")
    told = [guest_boot.guest_environment("7.3", Path("/modules"), exact) for exact in (True, False)]
    assert [each["UBLKPOOL_EXACT"] for each in told] == ["1", ""]


def _options(spec: Spec) -> dict[str, str]:
    emulator = Emulator(Path("/qemu"), (), Path("/virtiofsd"), virtiofsd_is_rust=True)
    words = qemu_command(spec, emulator, Path("/image"), Path("/run"), [], {})
    return dict(pairwise(words))


def test_time_is_instructions_in_an_exact_guest_and_only_there() -> None:
    exact = _options(Spec("7.3", (), cpus=1, exact=True))
    assert (exact["-icount"], exact["-smp"]) == ("shift=0", "1")
    assert exact["-accel"] == "tcg,thread=single"
    # QEMU would count each byte of a `rep movsb` as an instruction.
    assert {"-erms", "-fsrm"} <= set(exact["-cpu"].split(","))
    ordinary = _options(Spec("7.3", (), cpus=2))
    assert "-icount" not in ordinary
    assert (ordinary["-accel"], ordinary["-smp"]) == ("tcg,thread=multi", "2")
    assert {"max", "-erms", "-fsrm"} <= set(ordinary["-cpu"].split(","))
    assert _options(Spec("7.3", (), kvm=True))["-accel"] == "kvm"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the counter is read by an instruction of x86")
def test_an_emulated_guest_is_told_the_frequency_of_its_counter_which_it_may_measure_wrongly() -> None:
    khz = tsc.counter_khz()
    assert khz is not None and khz == pytest.approx(tsc.counter_khz(), rel=0.001)
    (told,) = re.findall(r" tsc_early_khz=(\d+) ", _options(Spec("7.3", ()))["-append"])
    assert int(told) == pytest.approx(khz, rel=0.001)
    for spec in (Spec("7.3", (), exact=True), Spec("7.3", (), kvm=True)):
        assert "tsc_early_khz" not in _options(spec)["-append"]


def test_the_frequency_of_a_counter_is_measured_against_the_clock() -> None:
    assert tsc._frequency_khz(lambda: time.monotonic_ns() // 4) == pytest.approx(250_000, rel=0.001)


def test_an_exact_guest_has_one_cpu_and_no_other_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UBLKPOOL_KVM", raising=False)
    assert [guest.exact_cpus(asked) for asked in (None, 1)] == [1, 1]
    with pytest.raises(CacheError, match="one CPU, not 2: leave --cpus out"):
        guest.exact_cpus(2)


def test_an_exact_guest_under_kvm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBLKPOOL_KVM", "1")
    with pytest.raises(CacheError, match="unset UBLKPOOL_KVM"):
        guest.exact_cpus(None)
