"""The room of ``polynomial_conv1d_dreg``: see README.md, then definition.py."""
