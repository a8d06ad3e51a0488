"""The room of ``polynomial_tangent``: see README.md, then definition.py."""
