"""Layers over a backend: each is a backend itself, which passes requests on to the one below."""
