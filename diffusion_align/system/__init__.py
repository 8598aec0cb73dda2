"""The machine around a run: terminals, disks, memory, the network, and text and JSON of unknown origin."""
