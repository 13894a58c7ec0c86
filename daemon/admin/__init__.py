"""The admin socket: its messages, its server and client, and the counters of `stats`."""
