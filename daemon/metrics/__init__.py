"""The exporter of metrics: a process of its own, which asks the daemon at each scrape."""
