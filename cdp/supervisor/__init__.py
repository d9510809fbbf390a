"""The supervisor: configuration, control API, NBD front door, and the life of other processes.

It serves no request of any client: a disk's recorder goes on while the supervisor is dead, and is
adopted by the next one. See CONCURRENCY.md for who runs when.
"""
