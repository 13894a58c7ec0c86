"""A Ceph cluster for tests, from the shell.

    python -m support.ceph start DIR        make it and its pool `rbd`; DIR/ceph.conf is for clients
    python -m support.ceph kill osd.1 DIR   `kill -9` of an OSD or of a monitor
    python -m support.ceph revive osd.1 DIR start it again; one in memory has lost its data
    python -m support.ceph cut DIR          cut it off from its clients (`start --network`); `heal` joins it again
    python -m support.ceph full DIR         let it count as full; `roomy` ends that
    python -m support.ceph status DIR       what runs, and what the monitors say
    python -m support.ceph tell JSON DIR    send the monitors a command, such as '{"prefix": "osd tree"}'
    python -m support.ceph stop DIR         end everything and remove DIR

The programs `rbd` and `rados` take `-c DIR/ceph.conf`; ours take `conf=DIR/ceph.conf id=ublkpool`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from support.ceph.cluster import CLIENT, POOL, Cluster, ClusterError, Shape
from support.ceph.programs import ProgramsMissing
from support.ceph.servers import NoServer


def main() -> None:
    """Parse the command line and do what it asks."""
    parser = argparse.ArgumentParser(
        prog="python -m support.ceph",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    start = commands.add_parser("start")
    start.add_argument("--osds", type=int, default=3, help="how many OSDs (3)")
    start.add_argument("--monitors", type=int, default=1, help="how many monitors (1)")
    start.add_argument("--replicas", type=int, default=2, help="how many OSDs keep each object (2)")
    start.add_argument("--store", choices=["memstore", "bluestore"], default="memstore")
    start.add_argument(
        "--network", action="store_true", help="a network of their own, for cut and heal (root)"
    )
    for name, what in {"kill": "osd.1 or mon.a", "revive": "osd.1 or mon.a", "tell": "JSON"}.items():
        commands.add_parser(name).add_argument("what", help=what)
    for name in ("cut", "heal", "full", "roomy", "status", "stop"):
        commands.add_parser(name)
    for each in commands.choices.values():
        each.add_argument("directory", metavar="DIR", type=Path)
    try:
        _do(parser.parse_args())
    except (ClusterError, ProgramsMissing, FileNotFoundError, FileExistsError, NoServer) as problem:
        sys.exit(f"support.ceph: {problem}")


def _do(asked: argparse.Namespace) -> None:
    if asked.command == "start":
        shape = Shape(
            stores=(asked.store,) * asked.osds,
            monitors=asked.monitors,
            replicas=asked.replicas,
            network=asked.network,
        )
        cluster = Cluster(asked.directory, shape, outlive_us=True)
        # Stopped again if it does not start as a whole.
        cluster.__enter__()
        print(f"conf={cluster.conf} id={CLIENT} pool={POOL}")
        return
    cluster = Cluster.found_in(asked.directory)
    actions: dict[str, Callable[[], object]] = {
        "kill": lambda: cluster.kill(asked.what),
        "revive": lambda: cluster.revive(asked.what),
        "cut": cluster.cut,
        "heal": cluster.heal,
        "full": cluster.fill,
        "roomy": cluster.make_room,
        "tell": lambda: print(*cluster.commands(json.loads(asked.what)), sep="\n"),
        "status": lambda: _show(cluster),
        "stop": cluster.stop,
    }
    actions[asked.command]()


def _show(cluster: Cluster) -> None:
    print("running:", *cluster.servers.alive())
    print(*cluster.commands({"prefix": "status"}, {"prefix": "osd tree"}), sep="\n")


if __name__ == "__main__":
    main()
