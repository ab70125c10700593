from nitro_e.model.emmdit import EMMDiT, ModelConfig
from nitro_e.model.pretrained import load_pretrained

# here and not in the class: pretrained knows the released format, which knows E-MMDiT
EMMDiT.from_pretrained = staticmethod(load_pretrained)

__all__ = ["EMMDiT", "ModelConfig"]
