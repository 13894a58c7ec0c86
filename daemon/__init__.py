"""The supervisor: devices, workers, the admin socket and the command line."""
