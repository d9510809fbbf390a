"""The command line `cdp`: it parses, calls the daemon's API and prints; it knows no disk's files.

Two commands do more: `cdp restore` copies out of a view over NBD, and `cdp journal dump` reads a
journal without the daemon. Everything that takes long to import is imported where it is used, since
`cdp status` is to answer in 0.3 s.
"""
