"""The command line: the commands of `ublkpool`, and the tables that they print."""
