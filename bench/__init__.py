"""Figures beside no mesh, taken in one run. Not shipped; see README.md."""
