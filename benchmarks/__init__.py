"""Measurements of the split, and the demo model that they and the tests run on."""
