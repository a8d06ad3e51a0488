"""The room of ``linear_activation_dreg``: see README.md, then definition.py."""
