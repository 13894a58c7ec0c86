"""Processes that the daemon starts and watches, and what they are asked over sockets."""
