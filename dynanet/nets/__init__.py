"""Static backbones, plain torch."""
