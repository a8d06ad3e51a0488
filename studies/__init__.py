"""The claims of the papers, put to the test on real data: one command for each study, ``python -m studies.NAME``.

docs/studies.md has what came out. The studies are not installed; ``pip install '.[studies]'`` gets what they need.
"""
