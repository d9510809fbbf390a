"""The recorder process: append, acknowledge, read the live disk."""
