"""What `ublkpool volume` calls of librbd beyond what serving an image needs."""

from ublkpool.backends.rbd.libraries import ffi

ffi.cdef(
    """
    typedef void *rbd_image_options_t;
    typedef struct { char *id; char *name; } rbd_image_spec_t;
    typedef struct { uint64_t id; uint64_t size; const char *name; } rbd_snap_info_t;

    void rbd_image_options_create(rbd_image_options_t *options);
    void rbd_image_options_destroy(rbd_image_options_t options);
    int rbd_image_options_set_uint64(rbd_image_options_t options, int option, uint64_t value);
    int rbd_create4(rados_ioctx_t io, const char *name, uint64_t size, rbd_image_options_t options);
    int rbd_clone3(rados_ioctx_t parent_io, const char *parent, const char *snapshot, rados_ioctx_t io,
                   const char *name, rbd_image_options_t options);
    int rbd_remove(rados_ioctx_t io, const char *name);
    int rbd_list2(rados_ioctx_t io, rbd_image_spec_t *images, size_t *count);
    void rbd_image_spec_list_cleanup(rbd_image_spec_t *images, size_t count);
    int rbd_get_parent_info(rbd_image_t image, char *pool, size_t pool_bytes, char *name, size_t name_bytes,
                            char *snapshot, size_t snapshot_bytes);
    int rbd_snap_create(rbd_image_t image, const char *name);
    int rbd_snap_remove(rbd_image_t image, const char *name);
    int rbd_snap_list(rbd_image_t image, rbd_snap_info_t *found, int *count);
    int rbd_snap_get_namespace_type(rbd_image_t image, uint64_t id, int *type);
    void rbd_snap_list_end(rbd_snap_info_t *found);
    """
)

FEATURES_TO_SET = 8
"""RBD_IMAGE_OPTION_FEATURES_SET."""
CLONE_FORMAT = 12
"""RBD_IMAGE_OPTION_CLONE_FORMAT: with 2 a snapshot needs no protection, and may be removed before its clones."""
LAYERING_AND_LOCK = 1 << 0 | 1 << 2
"""RBD_FEATURE_LAYERING, which clones need, and RBD_FEATURE_EXCLUSIVE_LOCK, which the backend needs."""
SNAPSHOT_OF_A_USER, SNAPSHOT_IN_THE_TRASH = 0, 2
"""RBD_SNAP_NAMESPACE_TYPE_USER and _TRASH: one that was removed, and that a clone needs."""
