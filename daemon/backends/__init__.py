"""Backends: the attach socket, the session of an attached backend, and the backend that the daemon runs itself."""
