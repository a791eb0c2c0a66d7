"""The network as a model of Hugging Face diffusers, saved in its format and placed, cast and offloaded by its tools."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from libs.dimr import DiMR, StageSpec


class DiMRNetwork(DiMR, ModelMixin, ConfigMixin):
    """`DiMR`, saved and loaded by diffusers: config.json and diffusion_pytorch_model.safetensors, in our names.

    Loaded in 16 bits, norms and their time-dependent vectors stay float32.

    Args:
        branches: the fields of each `StageSpec`, coarsest first; the others are as of `DiMR`.
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["norm", "norm_in", "norm_out"]
    _no_split_modules: ClassVar[list[str]] = ["Stage"]  # adds what its modules return, so it stays on one device
    _repeated_blocks: ClassVar[list[str]] = ["TransformerBlock", "ConvNeXtBlock"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        branches: Sequence[dict],  # not `stages`: to diffusers an argument and a submodule of one name are the same
        channels: int = 4,
        n_classes: int = 1000,
        norm_type: str = "TDRMSN",
        block_grad_to_lowres: bool = False,
    ):
        specs = [StageSpec(**branch) for branch in branches]
        super().__init__(specs, channels, n_classes, norm_type, block_grad_to_lowres)
        self.gradient_checkpointing = False

    @classmethod
    def of(cls, nnet: DiMR, norm_type: str) -> "DiMRNetwork":
        """Wrap a network: the same tensors, in eval mode."""
        branches = [asdict(stage.spec) for stage in nnet.stages]
        with torch.device("meta"):
            network = cls(branches, nnet.channels, nnet.n_classes, norm_type, nnet.block_grad_to_lowres)
        network.load_state_dict(nnet.state_dict(), assign=True)
        return network.eval().requires_grad_(False)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise in x at full resolution, (B, C, H, W) in the precision of the weights; see `DiMR.forward`.

        Give t in float32: it conditions the norms.
        """
        sample = super().forward(x.to(self.dtype), t, y)[-1]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint
    ) -> None:
        """Recompute the activations of blocks in the backward pass, or keep them; diffusers' methods call this."""
        self.gradient_checkpointing = enable
        for block in (block for stage in self.stages for block in stage.blocks):
            block.__dict__.pop("forward", None)
            if enable:
                block.forward = functools.partial(gradient_checkpointing_func, block.forward)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the training data: latents, or pixels."""
        finest = self.stages[-1].spec
        return self.channels, finest.max_height, finest.max_width
