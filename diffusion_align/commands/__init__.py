"""The commands. Apart from `cli` and `options`, nothing in the package imports them."""
