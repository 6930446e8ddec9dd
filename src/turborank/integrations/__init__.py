"""Adapters: turborank inside retrieval frameworks, in the caller's process, without a server.

Each module imports its framework itself; ``import turborank`` imports none of them. docs/integrations has a page each.
"""
