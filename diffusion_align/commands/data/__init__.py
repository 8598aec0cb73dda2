"""The `data` verbs: inspect, check, convert and synth, each in the file of its name."""
