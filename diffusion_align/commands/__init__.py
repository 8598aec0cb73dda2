"""What the command does: each module builds, wires, loops and writes. Leaves: nothing in the package imports them."""
