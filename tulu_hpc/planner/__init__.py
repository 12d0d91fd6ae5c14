"""Memory of a run before it is queued."""
