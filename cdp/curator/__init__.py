"""The curator process: apply, reclaim, sweep, index, retention."""
