"""Programs that count in full what docs/reliability.md promises (`make stress`), and what they share with the tests."""
