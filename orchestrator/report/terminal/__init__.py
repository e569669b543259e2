"""Tables for a terminal of any width."""
