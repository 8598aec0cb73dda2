"""`data annotate` and the reward "people": a person chooses between pictures in a page on this machine."""
