"""Features of images as the ADM evaluation suite takes them (openai/guided-diffusion, evaluations/evaluator.py).

The network is pytorch-fid's port of the 2015-12-05 TensorFlow Inception; the resizing to 299 x 299 is TensorFlow 1's,
which pytorch-fid's own is not: its FIDs are other numbers.
"""

import errno
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytorch_fid.inception
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from libs import UserError

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
SIDE = 299  # pixels: what the network was trained on
POOL, SPATIAL = 2048, 7 * 17 * 17  # features of each kind


def find_inception(assets: Path) -> Path:
    """Find pytorch-fid's weights in `assets`/inception or in PyTorch's hub cache. Nothing is downloaded.

    Raises FileNotFoundError, which says how to get them.
    """
    places = [assets / "inception" / WEIGHTS, Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS]
    for place in places:
        if place.is_file():
            return place
    download = 'python -c "import pytorch_fid.inception as i; i.fid_inception_v3()"'
    message = f"no Inception weights here or at {places[1]}: put pytorch-fid's there, or download 96 MB by {download}"
    raise FileNotFoundError(errno.ENOENT, message, str(places[0]))


class AdmInception(nn.Module):
    """Map uint8 images to the three kinds of features behind ADM's scores; in eval mode, float32.

    Args:
        inception: the whole network, as pytorch-fid's `fid_inception_v3()` makes it.
    """

    def __init__(self, inception: nn.Module):
        super().__init__()
        nodes = {"avgpool": "pool", "Mixed_6d.branch1x1": "spatial"}
        trunk = create_feature_extractor(inception.eval(), nodes).requires_grad_(False)
        self.trunk = trunk.to(memory_format=torch.channels_last)  # a third faster on a CPU
        self.register_buffer("class_weights", inception.fc.weight.detach().T.contiguous())

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute features of images, uint8 (B, 3, H, W) on the network's device.

        Returns:
            pool (B, 2048): `pool_3`;
            spatial (B, 2023): the first 7 channels of `mixed_6/conv`, flattened in H, W, C order;
            logits (B, 1008): pool times the last layer's weights, without its bias (as the suite has it).
        """
        x = (resize_like_tensorflow1(images.float(), SIDE) - 128) / 128
        # cuDNN's default, TF32, keeps 10 bits of the mantissa: not for numbers to be compared with published ones.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features = self.trunk(x.contiguous(memory_format=torch.channels_last))
        pool = features["pool"].flatten(1)
        spatial = features["spatial"][:, :7].permute(0, 2, 3, 1).flatten(1)
        return pool, spatial, pool @ self.class_weights


def resize_like_tensorflow1(images: Tensor, side: int) -> Tensor:
    """Resize bilinearly with the source at output index x (size / side): no half-pixel offset, no antialiasing.

    This is TensorFlow 1's resize_bilinear without align_corners, which the ADM suite's graph holds. Floating-point
    (B, C, H, W) -> (B, C, side, side).
    """
    for axis in (-1, -2):  # TensorFlow's order of rounding: along a row first
        size = images.shape[axis]
        # Made in float32 as TensorFlow does.
        position = torch.arange(side, dtype=torch.float32, device=images.device) * np.float32(size / side).item()
        low = position.floor().long()
        share = (position - low).view([-1] + [1] * (-1 - axis))
        high = (low + 1).clamp(max=size - 1)
        near, far = images.index_select(axis, low), images.index_select(axis, high)
        images = near + (far - near) * share
    return images


def load_adm_inception(path: Path, device: torch.device | str) -> AdmInception:
    """Load the network of `AdmInception` with the weights in `path`. Raises UserError for a file without them."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # pytorch-fid itself would run any code
        with patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *args, **kwargs: weights):
            inception = pytorch_fid.inception.fid_inception_v3()
    except Exception as error:  # torch.load and load_state_dict fail in any way on a damaged file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path} is damaged or not pytorch-fid's Inception ({reason}): fetch it again") from error
    return AdmInception(inception).to(device)
