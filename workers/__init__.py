"""Workers: one process per hardware queue, its loop, and its links to backend, broker and supervisor."""
