"""The benchmark: ublkpool and its peers side by side in one boot.  `bench/README.md` is the method."""
