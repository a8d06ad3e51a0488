"""The room of ``activation_tangent``: see README.md, then definition.py."""
