"""The room of ``activation_dreg``: see README.md, then definition.py."""
