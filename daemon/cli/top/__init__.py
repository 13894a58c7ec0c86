"""`ublkpool top`: devices, queues and events on a live screen."""
