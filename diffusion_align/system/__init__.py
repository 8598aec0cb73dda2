"""The machine around a run: terminals, disks, memory, the network, and untrusted text and JSON."""
