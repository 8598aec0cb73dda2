"""Training runs, whatever the method: read, open, plan, start, follow."""
