"""`ublkpool doctor`: looks at the machine, the daemon and what dead daemons left; changes nothing and never hangs."""
