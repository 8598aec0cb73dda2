"""Programs that measure what docs/reliability.md promises (`make stress` runs them), and helpers that tests use too."""
