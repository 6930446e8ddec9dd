"""Data: file formats (TREC, BEIR, JSON lines, CSV, Parquet), datasets, BM25. Imports nothing of the models."""
