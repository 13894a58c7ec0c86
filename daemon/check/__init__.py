"""`ublkpool backend check`: plays daemon, workers and kernel for one backend process, and judges its promises."""
