"""The routes, a file for each kind. A path asks for the key unless access.py says that it is open."""
