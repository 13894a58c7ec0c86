"""`python -m ublkpool.daemon` is `ublkpool`."""

from ublkpool.daemon.cli.commands import main

if __name__ == "__main__":
    main()
