"""A run as one HTML page, or several beside each other: read its folder, draw, write."""
