"""Rows that are not a leading axis (tiles of images, tokens with their neighbours), and fast kernels."""
