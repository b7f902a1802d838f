"""Early exits: small networks that answer from the features between two stages."""

from crowdexit.exits.feature_map import CNNExit, GammaBeta, SLViTExit, patch_size
from crowdexit.exits.head import Branch, MLPHead
from crowdexit.exits.tokens import CNNTokenExit, MixingExit, MLPTokenExit, PerceiverExit, ViTExit

__all__ = [
    "Branch",
    "CNNExit",
    "CNNTokenExit",
    "GammaBeta",
    "MLPHead",
    "MLPTokenExit",
    "MixingExit",
    "PerceiverExit",
    "SLViTExit",
    "ViTExit",
    "patch_size",
]
