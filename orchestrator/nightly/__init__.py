"""A merge every night, compared with the blessed one."""
