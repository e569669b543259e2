"""The verbs of the command line, one file per verb: read the input, call a room, print the result."""
