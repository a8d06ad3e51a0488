"""The room of ``activation_spatial_dreg``: see README.md, then definition.py."""
