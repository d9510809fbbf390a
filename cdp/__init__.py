"""The daemon, its processes, its interfaces and its command line."""
