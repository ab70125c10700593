"""Rectified flow, samplers of it, and the pipeline from prompts to images."""
