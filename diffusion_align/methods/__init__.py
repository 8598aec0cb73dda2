"""The methods, one file each, whose `METHOD` says what the training command asks of it. Shared pieces in `shared`."""
