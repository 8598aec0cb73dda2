"""The names of the samplers, for the options and the code that they choose. Imports nothing."""

SOLVERS = ("dpmpp", "ddim")
