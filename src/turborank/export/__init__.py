"""Models in other programs' formats: ONNX, sentence-transformers."""
