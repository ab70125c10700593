"""Captioned images and latents in webdataset tars: writing, indexing, an exact order, reading."""
