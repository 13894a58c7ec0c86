"""Keys of cephx, in the text that Ceph's programs read."""

import base64
import os
import struct
import time
from collections.abc import Mapping

_AES = 1


def new_key() -> str:
    """A random key: type, time of creation, length, then the secret itself, in base64."""
    secret = os.urandom(16)
    return base64.b64encode(struct.pack("<HIIH", _AES, int(time.time()), 0, len(secret)) + secret).decode()


def keyring_entry(entity: str, key: str, caps: Mapping[str, str]) -> str:
    """The section of one entity, such as client.admin."""
    rights = "".join(f'\tcaps {service} = "{right}"\n' for service, right in caps.items())
    return f"[{entity}]\n\tkey = {key}\n{rights}"
