"""Weights of the offline domain, as folders of safetensors: codec, text, vision (tools/train_components.py)."""

from pathlib import Path

PRETRAINED = Path(__file__).parent
