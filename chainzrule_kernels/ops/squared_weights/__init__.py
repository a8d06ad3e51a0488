"""The room of the squared weights in front of an activation: see README.md, then definition.py."""
