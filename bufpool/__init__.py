"""What a backend installs: the wire, the pool's memory, and the SDK.  Needs no root and imports nothing of ours."""
