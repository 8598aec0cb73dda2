"""Code that several methods use: noised pictures, pair losses, runs, branches, checks at the start, plans."""
