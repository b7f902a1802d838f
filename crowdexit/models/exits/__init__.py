"""Early exits: small networks that answer from the features between two stages."""

from crowdexit.models.exits.density import Context, DensityActivation, DensityBranch, density_conv, density_of
from crowdexit.models.exits.feature_map import CNNExit, GammaBeta, SLViTExit, patch_size
from crowdexit.models.exits.head import Branch, MLPHead
from crowdexit.models.exits.tokens import CNNTokenExit, MixingExit, MLPTokenExit, PerceiverExit, ViTExit

__all__ = [
    "Branch",
    "CNNExit",
    "CNNTokenExit",
    "Context",
    "DensityActivation",
    "DensityBranch",
    "GammaBeta",
    "MLPHead",
    "MLPTokenExit",
    "MixingExit",
    "PerceiverExit",
    "SLViTExit",
    "ViTExit",
    "density_conv",
    "density_of",
    "patch_size",
]
