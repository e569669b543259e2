"""Where tasks run and how often they are tried again. The only room that imports Ray."""
