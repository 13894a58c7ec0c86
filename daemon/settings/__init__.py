"""What the daemon was told (configuration) and the directories that are its own."""
