"""The room of ``polynomial_conv2d_dreg``: see README.md, then definition.py."""
