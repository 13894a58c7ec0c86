"""A disk of chunk objects in an S3-like store.

`backend.py` is the backend, `disk.py` the header object and its generation, `chunks.py` the chunk objects.
"""

from ublkpool.backends.s3.backend import S3Backend

BACKEND = S3Backend
