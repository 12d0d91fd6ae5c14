"""Scores of a model on local files in the public schemas; development and unseen suites are kept apart."""
