"""Backend processes: how they attach, one's session, and the one that the daemon runs itself."""
