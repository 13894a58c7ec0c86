"""The built-in backends, one a file, on nothing but the SDK in `ublkpool.bufpool`."""
