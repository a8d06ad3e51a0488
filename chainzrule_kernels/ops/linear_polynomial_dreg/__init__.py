"""The room of ``linear_polynomial_dreg``: see README.md, then definition.py."""
