"""The replay engine: points, resolution, apply, reclaim, views, restore and rollback."""
