"""nbdkit's own Python plugins as disks, under fio with verification of every byte."""

import base64
import pickle
from functools import partial

import pytest

from support.nbdkit.source_package import plugins_path
from support.vm.daemon import Daemon, total
from support.vm.fio import finish_fio, start_fio

pytestmark = pytest.mark.one_kernel("7.3")

MIB = 1 << 20
WRITTEN = MIB // 2


def test_three_of_nbdkits_plugins_return_what_was_written(daemon: Daemon) -> None:
    plugins, disk = plugins_path(), daemon.path("plugin.img")
    disk.write_bytes(bytes(MIB))
    configured = {"size": MIB, "can_flush": True, "can_fua": "emulate"}
    given = {
        "ramdisk": ("plugins/python/examples/ramdisk.py", {"test1": "foo"}),
        "file": ("plugins/python/examples/file.py", {"file": str(disk)}),
        "tests": (
            "tests/test-python-plugin.py",
            {"cfg": base64.b64encode(pickle.dumps(configured)).decode()},
        ),
    }
    added = daemon.together(
        *(
            partial(daemon.add, name, str(plugins / plugin), options)
            for name, (plugin, options) in given.items()
        )
    )
    assert [each.size_bytes for each in added] == [MIB] * 3
    running = [
        start_fio(each.path, size=WRITTEN, iodepth=8, fsync=16) for each in added if each.path is not None
    ]
    for status, fio in zip(added, running, strict=True):
        assert finish_fio(fio).written_bytes == WRITTEN
        stats = daemon.rest(status.name)
        assert total(stats, "errors") == total(stats, "violations") == 0
        daemon.delete(status.name)
    disk.unlink()
