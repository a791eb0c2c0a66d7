"""How fast a network is computed, not what: translated by torch.compile, with weights already in 16 bits."""

from collections.abc import Callable

import torch
from absl import logging
from torch import Tensor, nn

from libs.dimr import DiMR

COMPILE = ("auto", "whole", "blocks", "off")
SAMPLING_COMPILE = (*COMPILE, "graphs")


def choose_compile(how: str, device: torch.device, several: bool = False) -> str:
    """What auto of `COMPILE` stands for: off on CPUs; on GPUs whole, or blocks where `several` train together: the
    gradients of one block are sent while the next is computed (whole, the compiler would cut the network for that)."""
    if how != "auto":
        return how
    return "off" if device.type == "cpu" else "blocks" if several else "whole"


def compile_network(nnet: DiMR, how: str, final_weights: bool = False) -> None:
    """Have torch.compile translate a network, in place, at its first call of each shape.

    Without graph breaks, for fixed shapes.

    Args:
        how: whole, blocks or off. For sampling also graphs: whole, and on a GPU its launches recorded as one CUDA
            graph, so that the host's time per call does not count (it does with small batches).
        final_weights: the network is sampled with: its weights will not change any more, and no gradient is asked
            for. It is then compiled to the same kernels in every process (by default the compiler chooses among
            reductions by timing them), so that the images are the same from any number of processes. On a CPU a network
            compiled whole keeps its weights laid out for its matrix products.
    """
    if how == "off":
        return
    logging.info("torch.compile (%s): the first call takes minutes for a large network", how)
    # Networks share their code, and blocks: one function is translated for each, in training, without gradients ...
    torch._dynamo.config.recompile_limit = 64
    parts = [nnet]
    if how == "blocks":
        torch._dynamo.config.optimize_ddp = False  # or blocks would be cut again, to send their gradients sooner
        parts = [stage.upsample for stage in nnet.stages[1:]]
        for stage in nnet.stages:
            parts += [*stage.blocks, *stage.skips, stage.head]
    options = {"deterministic": True} if final_weights else {}
    if how == "graphs":
        options["triton.cudagraphs"] = True
    for module in parts:
        # The forward method and not the module, whose hooks (DDP's, FSDP's) stay outside.
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, options=options or None)
    if how == "graphs":
        nnet.forward = keeping_outputs(nnet.forward)
    if how == "whole" and final_weights and next(nnet.parameters()).device.type == "cpu":
        nnet.forward = with_fixed_weights(nnet.forward)


def round_weights(nnet: nn.Module, precision: str) -> None:
    """Bring the weights of matrix products to 16 bits, as autocast would at every call: the same numbers, sooner.

    For a network that is sampled with, always within autocast. `precision` is accelerate's: no, bf16 or fp16.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for module in nnet.modules() if dtype else ():
        for name, weight in module.named_parameters(recurse=False) if isinstance(module, nn.Linear) else ():
            setattr(module, name, nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad))


def with_fixed_weights(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A compiled function that, called without gradients, lays its weights out once for the matrix products.

    It also calls its kernels from C++: small ones take less time than Python needs to call them.
    """

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        # Read as a call compiles; freezing is no option of torch.compile.
        with torch._inductor.config.patch(freezing=True, cpp_wrapper=True):
            return forward(*inputs)

    return call


def keeping_outputs(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A function recorded as a CUDA graph, whose outputs the next call overwrites, as one that gives its own."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(output.clone() for output in forward(*inputs))

    return call
