"""Early exits: small networks that answer from the features between two stages."""

from crowdexit.exits.feature_map import CNNExit, GammaBeta, SLViTExit, patch_size
from crowdexit.exits.head import MLPHead

__all__ = ["CNNExit", "GammaBeta", "MLPHead", "SLViTExit", "patch_size"]
