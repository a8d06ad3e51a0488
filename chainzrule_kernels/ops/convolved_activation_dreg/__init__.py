"""The room of ``convolved_activation_dreg``: see README.md, then definition.py."""
