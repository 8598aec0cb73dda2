"""Several processes of one job: decisions that all of them share, and which rank caused a failure."""
