"""`sample`: pictures from a model, in a folder of their own or as benchmarks read them."""
