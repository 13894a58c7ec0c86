"""The built-in backends, one in each file; they use only `ublkpool.bufpool`, as any backend does."""
