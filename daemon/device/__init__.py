"""One device from its first start to its end: workers, attachment, recovery, records, its store's binding."""
