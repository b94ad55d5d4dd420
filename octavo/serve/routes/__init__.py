"""The routes beside chat and completions, a file for each kind."""
