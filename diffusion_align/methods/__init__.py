"""The methods, one file each: `METHOD` says what the training command needs to know of it. Shared pieces in `shared`."""
