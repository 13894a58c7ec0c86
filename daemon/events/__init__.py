"""What happened to the devices: events with stable codes, kept in a bounded file over restarts.

`tell.py` is what the daemon calls: one call that logs a line and records an event.  An event is made from the deed, not
from the log line, so that the log's level and format change no event.
"""
