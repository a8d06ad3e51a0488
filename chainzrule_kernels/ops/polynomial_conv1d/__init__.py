"""The room of ``polynomial_conv1d``: see README.md, then definition.py."""
