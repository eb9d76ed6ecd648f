"""Data: sources of uint8 images with labels, and the loader that feeds the train loop."""
