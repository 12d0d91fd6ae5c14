class FusibleOperation:
    """Only named in signatures."""


class Sequential:
    """Only named in signatures."""
