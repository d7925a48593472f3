"""What both processes agree on. Every file directly in this package is torch-free at import."""
