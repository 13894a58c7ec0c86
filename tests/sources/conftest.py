"""Tests of backends against real servers, which each test starts; the sanitized run leaves this folder out."""
