"""Code that several methods use: noised pictures, pair losses, trajectories, branches, checks at the start, plans."""
