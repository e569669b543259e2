"""What each verb of the command line does, one file a verb: read the input, call the one who knows, tell."""
