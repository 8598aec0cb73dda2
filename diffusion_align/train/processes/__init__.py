"""Several processes of one job: what all of them decide together, and which one is at fault when the job ends."""
