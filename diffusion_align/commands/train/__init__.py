"""Training runs of any method: read the data, load the model, plan, start, run the loop."""
