"""Mamba's layers as ``torch.nn`` modules."""
