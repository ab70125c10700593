"""Train, post-train, distil and ablate E-MMDiT, a small and fast text-to-image model.

from nitro_e import TextToImage
images = TextToImage.from_pretrained("runs/shapes-1-pretrain")(["a photo of a red circle"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nitro_e.model import EMMDiT, ModelConfig
    from nitro_e.sampling.pipeline import TextToImage

__version__ = "0.1.0"

__all__ = ["EMMDiT", "ModelConfig", "TextToImage", "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use: reading a config or packing data needs no torch."""
    if name in ("EMMDiT", "ModelConfig"):
        from nitro_e import model

        return getattr(model, name)
    if name == "TextToImage":
        from nitro_e.sampling.pipeline import TextToImage

        return TextToImage
    raise AttributeError(f"module 'nitro_e' has no attribute '{name}'")
