class DelayedScaling:
    """Only derived from."""
