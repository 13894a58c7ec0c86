"""The configuration, and the directories that the daemon makes for itself."""
