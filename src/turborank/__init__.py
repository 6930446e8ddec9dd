"""turborank."""
