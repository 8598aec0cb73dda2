"""What several methods are made of: noised pictures, pair losses, runs, branches, checks at the start, plans."""
