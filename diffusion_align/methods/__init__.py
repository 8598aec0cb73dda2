"""The methods, one file each; its `METHOD` describes it to the training command. Common code is in `shared`."""
