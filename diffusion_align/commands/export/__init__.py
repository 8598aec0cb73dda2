"""`export`: the result of a run in the format of another program."""
