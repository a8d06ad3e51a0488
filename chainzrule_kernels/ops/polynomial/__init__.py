"""The room of ``polynomial``: see README.md, then definition.py."""
