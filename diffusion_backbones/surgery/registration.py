"""What a declaration must be before it is registered: a recipe that its network can give."""

from __future__ import annotations

from diffusion_backbones.spec.configs import package_configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.fusion import Fusion
from diffusion_backbones.surgery.plan import Plan


def check_declaration(declaration: Declaration | Fusion) -> None:
    """Check that the network of a declaration has what its recipe reads; those of a fusion's members were checked.

    Raises:
        KeyError: It lacks an activation.
        ValueError: Levels that cannot be, or an architecture that is not in the package, by which lists and cards are
            made.
    """
    if isinstance(declaration, Fusion):
        return
    checkpoint = declaration.checkpoint
    if not package_configs(checkpoint):
        raise ValueError(
            f"the package has no architecture for {checkpoint.name}, so {declaration.name} cannot be listed; give "
            "configs=, the name of a checkpoint with the same, or load it with "
            "create_model('hf-hub:owner/repo', recipe=...)"
        )
    Plan.of(declaration).check_postprocessing()
