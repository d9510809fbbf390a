"""The viewer process: views and restores, read-only."""
