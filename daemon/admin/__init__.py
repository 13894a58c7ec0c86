"""The admin socket: its requests and answers, both ends, and the numbers that it tells."""
