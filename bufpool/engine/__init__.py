"""The native engine: frames in, storage, frames out, in C; and the typed face of it."""
