"""The room of ``polynomial_dreg``: see README.md, then definition.py."""
