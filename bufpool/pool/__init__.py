"""The pool: a device's shared memory, who has which buffer of it, and the broker process that lends them."""
