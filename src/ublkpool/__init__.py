"""Linux block devices served from user space: ublk, io_uring, and backends that own the memory writes land in."""

__version__ = "0.1.0"
