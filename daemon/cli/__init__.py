"""The command line: each command of `ublkpool`, and how its answer is shown."""
