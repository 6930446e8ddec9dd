"""The command line: one module for each subcommand, options that they share, and ``main``."""
