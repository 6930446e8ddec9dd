"""Adapters to retrieval frameworks and cluster engines. They rerank in the caller's process, without a server.

Each module imports its framework; ``import turborank`` imports none of them. docs/integrations has a page for each.
"""
