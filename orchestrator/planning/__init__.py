"""From the headers of the parents to everything that a run will do."""
