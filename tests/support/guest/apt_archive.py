"""A Debian archive, found through apt's configuration; only signed content is trusted.

Owns the chain of trust InRelease (gpgv, the Debian keyring) -> Packages.xz (SHA256) -> .deb (SHA256), and the same for
Sources.xz and the file of a source package.
Knows nothing of guests or kernels. Nothing here needs root, and nothing is installed on the host.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_ETC = Path("/etc/apt")
OS_RELEASE = Path("/etc/os-release")
DOWNLOAD_ATTEMPTS_MAX = 4
SOCKET_TIMEOUT_S = 60
CHUNK_BYTES = 1 << 20
BINARIES = "main/binary-amd64/Packages.xz"
SOURCES = "main/source/Sources.xz"
# Sources may name a release by its class as well as by its code name.
RELEASE_CLASSES = frozenset({"stable", "oldstable", "oldoldstable", "testing", "unstable", "sid"})


class ArchiveError(Exception):
    """The archive cannot be found, or its content does not match its signature."""


@dataclass(frozen=True)
class Source:
    """One entry of apt's source lists."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]


@dataclass(frozen=True)
class Package:
    """One .deb as a signed index describes it."""

    name: str
    version: str
    filename: str
    size_bytes: int
    sha256: str

    def age_key(self) -> tuple[int, ...]:
        """Newest last: kernel packages carry their version in the name, so the name counts first."""
        return tuple(int(n) for n in re.findall(r"\d+", f"{self.name} {self.version}"))


def parse_fields(paragraph: str) -> dict[str, str]:
    """One RFC 822 paragraph as Debian writes it; continuation lines are joined with newlines."""
    fields: dict[str, str] = {}
    key = ""
    for line in paragraph.splitlines():
        if line.startswith("#"):
            continue
        if line[:1] in (" ", "\t"):
            if key:
                fields[key] += "\n" + line.strip()
            continue
        key, colon, value = line.partition(":")
        key = key.strip().lower() if colon else ""
        if key:
            fields[key] = value.strip()
    return fields


def parse_deb822(text: str) -> list[Source]:
    """The binary package sources of one `*.sources` file."""
    found = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields = parse_fields(paragraph)
        if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        if "deb" in fields.get("types", "").split():
            uris, suites, components = (
                tuple(fields.get(k, "").split()) for k in ("uris", "suites", "components")
            )
            found.append(Source(uris, suites, components))
    return found


def parse_one_line(text: str) -> list[Source]:
    """The binary package sources of one `sources.list` or `*.list` file."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]*)", line)
        if match:
            uri, suite, components = match.groups()
            found.append(Source((uri,), (suite,), tuple(components.split())))
    return found


def read_sources(etc: Path = APT_ETC) -> list[Source]:
    """Every source in apt's configuration on this machine."""
    parts = etc / "sources.list.d"
    found = []
    for path in [etc / "sources.list", *sorted(parts.glob("*.list"))]:
        if path.is_file():
            found += parse_one_line(path.read_text())
    for path in sorted(parts.glob("*.sources")):
        found += parse_deb822(path.read_text())
    return found


def release_codename(text: str) -> str:
    """`bookworm`, from the text of os-release."""
    match = re.search(r'^VERSION_CODENAME="?(\w+)', text, re.MULTILINE)
    return match.group(1) if match else ""


def expand_mirror(uri: str) -> list[str]:
    """The plain http(s) addresses behind one URI; cloud images keep theirs in a mirror list file."""
    if uri.startswith(("http://", "https://")):
        return [uri.rstrip("/")]
    if uri.startswith("mirror+file:"):
        path = Path("/" + uri.removeprefix("mirror+file:").lstrip("/"))
        if path.is_file():
            lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
            return [words[0].rstrip("/") for words in lines if words and words[0].startswith("http")]
    return []


def candidate_mirrors(sources: Iterable[Source], codename: str) -> list[str]:
    """Addresses that carry this machine's release, each once; gpgv decides whether one is Debian."""
    mirrors: dict[str, None] = {}
    for source in sources:
        if "main" in source.components and {codename, *RELEASE_CLASSES} & set(source.suites):
            for uri in source.uris:
                mirrors.update(dict.fromkeys(expand_mirror(uri)))
    return list(mirrors)


def parse_release_hashes(text: str) -> dict[str, str]:
    """path -> SHA256, from the verified text of an InRelease file."""
    section = re.search(r"^SHA256:\n((?: .*\n?)+)", text, re.MULTILINE)
    if section is None:
        raise ArchiveError("the release file has no SHA256 section")
    rows = (line.split() for line in section.group(1).splitlines())
    return {path: digest for digest, _size, path in rows}


def parse_packages(text: str, wanted: re.Pattern[str]) -> Iterator[Package]:
    """The packages of an index whose whole name matches `wanted`."""
    for paragraph in text.split("\n\n"):
        name = paragraph.partition("\n")[0].removeprefix("Package: ")
        if wanted.fullmatch(name):
            f = parse_fields(paragraph)
            yield Package(name, f["version"], f["filename"], int(f["size"]), f["sha256"])


def parse_sources(text: str, name: str) -> Iterator[Package]:
    """The upstream tarballs of a source package, one for each version in the index."""
    for paragraph in re.findall(rf"^Package: {re.escape(name)}\n(?:.+\n)*", text, re.MULTILINE):
        fields = parse_fields(paragraph)
        for row in fields.get("checksums-sha256", "").split("\n"):
            if re.search(r"\.orig\.tar\.\w+$", row):
                digest, size, file = row.split()
                yield Package(name, fields["version"], f"{fields['directory']}/{file}", int(size), digest)


def apt_proxies() -> dict[str, str]:
    """The proxies of apt's configuration; those of the environment take precedence, as in apt."""
    try:
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    found = re.findall(r'^Acquire::(https?)::Proxy "([^"]+)";', dump, re.MULTILINE)
    return {scheme: proxy for scheme, proxy in found if proxy != "DIRECT"}


class Archive:
    """One mirror, and the verified suites read from it so far."""

    def __init__(self, mirrors: list[str], scratch: Path) -> None:
        self._mirrors = mirrors
        self._scratch = scratch
        self._indexes: dict[tuple[str, str], str] = {}
        proxies = apt_proxies() | urllib.request.getproxies()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    @classmethod
    def of_this_host(cls, scratch: Path) -> "Archive":
        """The archive this machine's apt is configured for."""
        mirrors = candidate_mirrors(read_sources(), release_codename(OS_RELEASE.read_text()))
        if not mirrors:
            raise ArchiveError(f"no Debian mirror with component main in {APT_ETC}/sources.list*")
        return cls(mirrors, scratch)

    def newest(self, suite: str, pattern: str) -> Package:
        """The newest package of a suite whose name matches."""
        found = sorted(parse_packages(self._index(suite), re.compile(pattern)), key=Package.age_key)
        if not found:
            raise ArchiveError(f"suite {suite} has no package {pattern}")
        return found[-1]

    def newest_source(self, suite: str, name: str) -> Package:
        """The newest upstream tarball of a source package in a suite."""
        found = sorted(parse_sources(self._index(suite, SOURCES), name), key=Package.age_key)
        if not found:
            raise ArchiveError(f"suite {suite} has no source package {name}")
        return found[-1]

    def download(self, package: Package) -> Path:
        """The package's file, its SHA256 checked. The caller removes it."""
        target = self._scratch / Path(package.filename).name
        print(f"guest: fetching {target.name} ({package.size_bytes / 1e6:.1f} MB)", flush=True)
        for mirror in self._mirrors:
            with contextlib.suppress(urllib.error.HTTPError):
                self._get(f"{mirror}/{package.filename}", target, package.sha256)
                return target
        raise ArchiveError(f"no mirror has {package.filename}")

    def _index(self, suite: str, path: str = BINARIES) -> str:
        if (suite, path) not in self._indexes:
            self._indexes[suite, path] = self._fetch_index(suite, path)
        return self._indexes[suite, path]

    def _fetch_index(self, suite: str, path: str) -> str:
        print(f"guest: reading the package index of {suite}", flush=True)
        problems = []
        directory, _, file = path.rpartition("/")
        for mirror in self._mirrors:
            base = f"{mirror}/dists/{suite}"
            try:
                digest = parse_release_hashes(self._verified_release(base))[path]
                packed = self._scratch / f"{suite}.{file}"
                self._get(f"{base}/{directory}/by-hash/SHA256/{digest}", packed, digest)
            except (ArchiveError, urllib.error.HTTPError, KeyError) as problem:
                problems.append(f"{mirror}: {problem!r}")
                continue
            text = subprocess.run(["xz", "-dc", packed], capture_output=True, check=True).stdout
            packed.unlink()
            return text.decode()
        raise ArchiveError(f"no usable suite {suite}: " + "; ".join(problems))

    def _verified_release(self, base: str) -> str:
        signed = self._scratch / "InRelease"
        self._get(f"{base}/InRelease", signed, None)
        gpgv = subprocess.run(
            ["gpgv", "--keyring", str(KEYRING), "--output", "-", str(signed)], capture_output=True
        )
        signed.unlink()
        if gpgv.returncode != 0:
            raise ArchiveError(f"{base}/InRelease: bad signature:\n{gpgv.stderr.decode()}")
        # Only gpgv's output is signed; the file may contain more text around it.
        return gpgv.stdout.decode()

    def _get(self, url: str, target: Path, sha256: str | None) -> None:
        """Download to `target`; a wrong digest or a broken connection is tried again, a 404 is not."""
        for attempt in range(1, DOWNLOAD_ATTEMPTS_MAX + 1):
            try:
                digest = self._stream(url, target)
                if sha256 in (None, digest):
                    return
                problem: Exception = ArchiveError(f"{url}: SHA256 is {digest}, should be {sha256}")
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise
                problem = error
            except OSError as error:
                problem = error
            target.unlink(missing_ok=True)
            print(f"guest: attempt {attempt}: {problem}", flush=True)
            time.sleep(attempt)
        raise ArchiveError(f"{url}: {problem}")

    def _stream(self, url: str, target: Path) -> str:
        digest = hashlib.sha256()
        with self._opener.open(url, timeout=SOCKET_TIMEOUT_S) as answer, target.open("wb") as out:
            while chunk := answer.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
            os.fsync(out.fileno())
        return digest.hexdigest()
