"""`ublkpool volume` on images of a real cluster, as the client whose caps docs/CEPH.md gives."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from support.ceph.cluster import CLIENT, CLIENT_CAPS, POOL, Cluster
from support.ceph.programs import program
from support.fakes.worker import FakeWorker, finish, spawn
from ublkpool.daemon.cli.commands import cli

MIB = 1 << 20
READER_CAPS = {"mon": "profile rbd", "osd": f"profile rbd-read-only pool={POOL}"}


class Volume:
    """The command for one image."""

    def __init__(self, cluster: Cluster, image: str, client: str = CLIENT) -> None:
        self.cluster, self.image, self.client = cluster, image, client

    def run(self, command: str, *arguments: str, **options: str) -> Result:
        """One command; `options` are more KEY=VALUE."""
        where = {"pool": POOL, "conf": str(self.cluster.conf), "id": self.client, **options}
        if self.image:
            where["image"] = self.image
        pairs = [f"{key}={value}" for key, value in where.items()]
        return CliRunner().invoke(cli, ["volume", command, "rbd", *pairs, *arguments])

    def does(self, command: str, *arguments: str, **options: str) -> str:
        """What a command that succeeds prints."""
        done = self.run(command, *arguments, **options)
        assert done.exit_code == 0, done.output
        return done.stdout

    def refuses(self, command: str, *arguments: str, **options: str) -> str:
        """The one line of a command that is refused."""
        refused = self.run(command, *arguments, **options)
        assert (refused.exit_code, refused.stdout) == (2, ""), refused.output
        (line,) = refused.stderr.splitlines()
        return line

    def other(self, image: str) -> "Volume":
        """Another image."""
        return Volume(self.cluster, image, self.client)

    def write(self, text: str) -> None:
        """Replace the image's first bytes, by Ceph's own command."""
        self.cluster.rbd(
            "bench", "--io-type", "write", "--io-size", "4K", "--io-total", "4K", f"{POOL}/{self.image}"
        )


@pytest.fixture
def golden(ceph: Cluster, request: pytest.FixtureRequest) -> Iterator[Volume]:
    """A new image of 8 MiB with content; its name is the test's own."""
    volume = Volume(ceph, f"golden-{abs(hash(request.node.nodeid)) % 10**8}")
    volume.does("create", "--size", "8M")
    yield volume


def _content(cluster: Cluster, image: str) -> bytes:
    path = cluster.directory / "exported"
    cluster.rbd("export", f"{POOL}/{image}", str(path))
    content = path.read_bytes()
    path.unlink()
    return content


def _fill(cluster: Cluster, image: str, tmp_path: Path) -> bytes:
    """Make the image with content; returns that."""
    content = b"golden" * 1000 + bytes(8 * MIB - 6000)
    (tmp_path / "content").write_bytes(content)
    cluster.rbd("import", str(tmp_path / "content"), f"{POOL}/{image}")
    return content


def test_the_documents_caps_are_those_of_these_tests() -> None:
    text = (Path(__file__).parents[2] / "docs/CEPH.md").read_text()
    for caps in (CLIENT_CAPS, READER_CAPS):
        words = " ".join(f"{service} '{right}'" for service, right in caps.items())
        assert words.replace(f"pool={POOL}", "pool=vms") in text


def test_an_image_is_made_listed_grown_and_deleted(ceph: Cluster, golden: Volume) -> None:
    listed = {each["name"]: each for each in json.loads(golden.other("").does("list", "--json"))}
    assert listed[golden.image] == {
        "name": golden.image,
        "size_bytes": 8 * MIB,
        "used_bytes": None,
        "parent": "",
        "snapshots": [],
        "users": [],
    }
    assert "exclusive-lock" in ceph.rbd("info", f"{POOL}/{golden.image}")
    assert golden.does("resize", "--size", "16M") == "grew from 8M to 16M (16777216 bytes)\n"
    assert "never shrinks" in golden.refuses("resize", "--size", "8M")
    assert "exists already" in golden.refuses("create", "--size", "8M")
    assert "multiple of 512" in golden.refuses("resize", "--size", "16777217")
    golden.does("delete")
    assert golden.image not in ceph.rbd("ls", POOL).split()
    assert "no such image" in golden.refuses("delete")


def test_a_clone_of_a_golden_image_is_one_command_and_leaves_no_snapshot(
    ceph: Cluster, tmp_path: Path
) -> None:
    golden = Volume(ceph, "golden")
    content = _fill(ceph, golden.image, tmp_path)
    made = golden.does("clone", "--to", "vm7")
    assert made.split() == [f"pool={POOL}", f"conf={ceph.conf}", f"id={CLIENT}", "image=vm7"]
    assert _content(ceph, "vm7") == content
    assert ceph.rbd("snap", "ls", f"{POOL}/golden") == ""
    clone = next(
        each for each in json.loads(golden.other("").does("list", "--json")) if each["name"] == "vm7"
    )
    assert clone["parent"].startswith(f"{POOL}/golden@")
    # The original is needed, says so, and goes when the clone is gone.
    assert "clone" in golden.refuses("delete")
    assert _content(ceph, "vm7") == content
    golden.other("vm7").does("delete")
    golden.does("delete")


def test_a_clone_of_a_snapshot_has_the_content_of_then(ceph: Cluster, golden: Volume) -> None:
    before = _content(ceph, golden.image)
    assert golden.does("snapshot", "--name", "monday").endswith(f"image={golden.image} snapshot=monday\n")
    golden.write("changed")
    assert _content(ceph, golden.image) != before
    assert "no snapshot tuesday; it has: monday" in golden.refuses(
        "clone", "--to", "none", snapshot="tuesday"
    )
    golden.does("clone", "--to", f"{golden.image}-then", snapshot="monday")
    assert _content(ceph, f"{golden.image}-then") == before
    assert "exists already" in golden.refuses("clone", "--to", f"{golden.image}-then", snapshot="monday")
    assert "are deleted first: monday" in golden.refuses("delete")
    golden.other(f"{golden.image}-then").does("delete")
    golden.does("delete", snapshot="monday")
    golden.does("delete")


def test_a_refused_clone_leaves_no_snapshot(ceph: Cluster, golden: Volume) -> None:
    assert "exists already" in golden.refuses("clone", "--to", golden.image)
    assert ceph.rbd("snap", "ls", f"{POOL}/{golden.image}") == ""


def test_what_is_wrong_is_one_line(ceph: Cluster, golden: Volume, tmp_path: Path) -> None:
    assert "option image is missing" in golden.other("").refuses("create", "--size", "1M")
    assert "pool=nowhere: the cluster has no such pool" in golden.refuses("list", pool="nowhere")
    assert f"conf={tmp_path}/none" in golden.refuses("list", conf=f"{tmp_path}/none")
    assert "snapshot=monday: resize is for an image" in golden.refuses(
        "resize", "--size", "9M", snapshot="monday"
    )


def test_a_client_that_may_only_read_lists_and_deletes_nothing(ceph: Cluster, golden: Volume) -> None:
    ceph.add_client("viewer", READER_CAPS)
    viewer = Volume(ceph, golden.image, "viewer")
    assert golden.image in viewer.other("").does("list")
    assert "Operation not permitted" in viewer.refuses("delete")
    assert golden.image in ceph.rbd("ls", POOL).split()


def test_an_image_that_a_client_has_open_is_neither_grown_nor_deleted_but_kept_and_cloned(
    ceph: Cluster, golden: Volume
) -> None:
    command = [program("rbd"), "-c", str(ceph.conf), "--id", "admin", "watch", f"{POOL}/{golden.image}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            assert "press enter to exit" in client.stdout.readline()
            for command_line in (("resize", "--size", "9M"), ("delete",)):
                line = golden.refuses(*command_line)
                assert "in use by client." in line
                assert "ublkpool del" in line
            (found,) = [
                each
                for each in json.loads(golden.other("").does("list", "--json"))
                if each["name"] == golden.image
            ]
            assert len(found["users"]) == 1
            golden.does("snapshot", "--name", "live")
            golden.does("clone", "--to", f"{golden.image}-copy")
        finally:
            client.communicate("\n")
    golden.does("delete", snapshot="live")
    golden.other(f"{golden.image}-copy").does("delete")
    golden.does("delete")


def test_a_client_that_may_only_read_serves_a_snapshot(ceph: Cluster, golden: Volume, tmp_path: Path) -> None:
    content = _content(ceph, golden.image)
    golden.does("snapshot", "--name", "monday")
    ceph.add_client("server", READER_CAPS)
    given = {
        "pool": POOL,
        "image": golden.image,
        "conf": str(ceph.conf),
        "id": "server",
        "snapshot": "monday",
    }
    with FakeWorker(tmp_path) as worker:
        process = spawn(worker.run_dir, "rbd", given)
        try:
            attach = worker.accept()
            assert attach.read_only
            assert worker.read(0, 4096) == content[:4096]
        finally:
            process.terminate()
            finish(process)


def test_a_client_in_its_namespace_sees_nothing_of_the_pool(ceph: Cluster, golden: Volume) -> None:
    ceph.rbd("namespace", "create", f"{POOL}/alice")
    ceph.add_client("alice", {"mon": "profile rbd", "osd": f"profile rbd pool={POOL} namespace=alice"})
    alice = Volume(ceph, "own", "alice")
    alice.does("create", "--size", "1M", namespace="alice")
    alice.does("clone", "--to", "copy", namespace="alice")
    listed = alice.other("").does("list", "--json", namespace="alice")
    assert [each["name"] for each in json.loads(listed)] == ["copy", "own"]
    assert "Operation not permitted" in alice.other("").refuses("list")


@pytest.mark.long
def test_a_client_that_may_not_exclude_others_cannot_take_over(
    ceph: Cluster, golden: Volume, tmp_path: Path
) -> None:
    ceph.add_client("weak", {"mon": "allow r", "osd": f"profile rbd pool={POOL}"})
    given = {"pool": POOL, "image": golden.image, "conf": str(ceph.conf), "id": "weak"}
    with FakeWorker(tmp_path) as worker:
        first = spawn(worker.run_dir, "rbd", given)
        owner = worker.accept().owner
        first.kill()
        finish(first)
        worker.described = {"former_owner": owner, "takes_over": False}
        second = spawn(worker.run_dir, "rbd", given)
        worker.answer_question()
        status, log = finish(second)
        assert status != 0
        assert f"rbd: {POOL}/{golden.image}: lock: Permission denied" in log
