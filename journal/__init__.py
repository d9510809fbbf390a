"""The journal: redo log, undo log, index and catalog of one disk."""
