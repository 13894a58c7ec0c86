"""The kernel's side of a device: control commands, the disk's node, its users, the client area."""
