"""One process per hardware queue: what is forked, and the loop it runs."""
