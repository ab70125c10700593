"""The frozen encoders: codec, text, vision and CLIP, and the table of their names."""
