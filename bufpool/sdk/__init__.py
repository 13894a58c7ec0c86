"""The SDK: what the author of a backend imports, and the loop that serves it."""
