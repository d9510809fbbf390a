"""The control API and the metrics: HTTP in front of what the supervisor can do.

Written against `control.Control`, so that nothing here knows how it is done.
"""
