"""Files and collections: TREC and BEIR formats, datasets, the first stage. Knows no model."""
