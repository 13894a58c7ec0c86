"""nbdkit's Python plugins as backends, unchanged.

`recognise` finds out that a file is such a plugin, `script` runs it as nbdkit does, `api` is the module `nbdkit` that
it imports, `plugin` is the backend that calls its functions.  The reference is nbdkit's python plugin, with the
defaults of its server (server/plugins.c), version 1.32, and the functions of the module `nbdkit` up to version 1.42.
"""
