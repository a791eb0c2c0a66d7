"""FID features: pytorch-fid's port of the 2015-12-05 TensorFlow Inception network."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from pytorch_fid.inception import InceptionV3
from torch import Tensor

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"


def find_inception(assets: Path) -> Path:
    """pytorch-fid's weight file, in `assets`/inception or in PyTorch's hub cache.

    Raises:
        FileNotFoundError: it is in neither; says where to put it.
    """
    places = [assets / "inception" / WEIGHTS, Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"no Inception weights: expected {WEIGHTS} (from the releases of the repository mseitzer/pytorch-fid) at "
        f"{places[0]} or {places[1]}"
    )


def load_inception(path: Path, device: torch.device | str) -> InceptionV3:
    """pytorch-fid's network with 2048 pool features, in eval mode."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not cached.exists():  # pytorch-fid reads it from nowhere else
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.symlink_to(path.resolve())
    return InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval().to(device)


@torch.no_grad()
def pool_features(network: InceptionV3, batches: Iterable[Tensor], device: torch.device | str) -> np.ndarray:
    """2048-d features of uint8 image batches (B, 3, H, W) as pytorch-fid computes them: (N, 2048) float32."""
    features = [network(batch.to(device).float() / 255)[0].flatten(1).cpu() for batch in batches]
    return torch.cat(features).numpy()
