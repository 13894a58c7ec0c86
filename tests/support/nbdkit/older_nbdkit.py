"""Runs a plugin, named by the environment variable PLUGIN, in an nbdkit that is older than the plugin.

The plugin is not changed: the module `nbdkit` gets the functions that the older one lacks.  nbdkit runs this file.
"""

import os
import runpy
import sys
from pathlib import Path

import nbdkit  # type: ignore[import-not-found]

texts = runpy.run_path(os.environ["TEXTS"])
for name, function in {
    "is_tls": lambda: False,
    "read_password": texts["read_password"],
    "parse_probability": texts["parse_probability"],
    "parse_delay": texts["parse_delay"],
}.items():
    if not hasattr(nbdkit, name):
        setattr(nbdkit, name, function)

# nbdkit's stdout is the connection to the client.
sys.stdout = sys.stderr
plugin = os.environ["PLUGIN"]
exec(compile(Path(plugin).read_text(), plugin, "exec"), globals())
