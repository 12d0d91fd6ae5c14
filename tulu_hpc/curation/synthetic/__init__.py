"""A small world of problems with checkable answers: the quickstart's data."""
