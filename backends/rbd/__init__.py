"""An image of a Ceph cluster (RBD) as a store.

`backend.py` is the backend, `cluster.py` the connection to the cluster, `image.py` the open image, `owner.py` who may
have its lock, `pulse.py` whether the cluster still hears this client, `libraries.py` the C libraries.
"""

from ublkpool.backends.rbd.backend import RbdBackend

BACKEND = RbdBackend
