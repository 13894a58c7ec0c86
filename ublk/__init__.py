"""The kernel boundary: the only folder that knows io_uring and the ublk ABI."""
