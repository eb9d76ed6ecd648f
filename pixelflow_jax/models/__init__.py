"""Networks. `transformer.PixelFlow` is the generator."""
