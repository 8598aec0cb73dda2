"""Models in diffusers' format: a folder with a folder for each component."""
