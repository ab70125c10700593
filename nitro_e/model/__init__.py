from nitro_e.model.emmdit import EMMDiT, ModelConfig

__all__ = ["EMMDiT", "ModelConfig"]
