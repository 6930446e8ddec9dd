"""The command line: one module for each subcommand, shared options, and ``main``."""
