"""Branches for tests."""

from crowdexit.models import zoo

PLACES = ("V1", "AV1", "AV2")


def both_kinds() -> tuple[zoo.ExitSpec, ...]:
    """V1, AV1 and AV2 as SL-ViT, and the CNN baseline beside each as ``V1-cnn`` and so on."""
    slvit = [zoo.ExitSpec(place, place, "slvit") for place in PLACES]
    cnn = [zoo.ExitSpec(f"{place}-cnn", place, "cnn") for place in PLACES]
    return (*slvit, *cnn)
