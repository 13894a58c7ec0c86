"""The processes that the daemon starts and watches, and the channels to them."""
