"""The room of ``polynomial_spatial_dreg``: see README.md, then definition.py."""
