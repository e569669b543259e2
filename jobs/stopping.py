"""Whether the user has stopped the program: then no thread waits to try again."""

from threading import Event

STOPPED = Event()
"""Set from the signal on until the command has ended."""
