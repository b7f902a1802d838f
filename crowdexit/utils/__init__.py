"""What everything else stands on: files, locks, paths, signals, the machine."""
