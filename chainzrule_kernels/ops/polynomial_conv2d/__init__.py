"""The room of ``polynomial_conv2d``: see README.md, then definition.py."""
