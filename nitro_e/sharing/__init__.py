"""Models for other programs: a pipeline of diffusers, and programs of ONNX and torch.export."""
