"""Passes over a GPU's memory, and their bytes, of a network compiled for one: counted without a GPU.

    python benchmarks/passes.py --config=configs/DiMR-XL-2R_imagenet256.py --batch=64 --largest=10

PyTorch's compiler (Inductor) translates the network for a card of compute capability 9.0, from tensors without storage,
up to its list of kernels in order; none is built or run. A kernel is a pass: it reads arrays from memory and writes
arrays. Matrix products, attention and convolutions are calls of libraries; what stands between them is fused passes,
whose time is that of their bytes. This is a count for comparing one way of writing the network with another: times,
what a cache holds, and all that happens outside the network (loss, optimiser, averages) are not in it.

The graph is traced on a CPU and moved to the card before it is optimised, as tracing a backward pass on a card needs
one. Attention therefore goes by its CPU name; it is one kernel either way (a GPU's also copies heads whose width is no
multiple of 8, which the network avoids). Uses Inductor's insides: tried with PyTorch 2.14.
"""

import argparse
import collections
import contextlib
import platform
import re
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._dynamo.device_interface import get_interface_for_device
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, config, graph, scheduler
from torch._inductor.exc import InductorError
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import utils
from libs import depthwise, dimr
from libs.compilation import round_weights

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIBRARY_CALLS = {"mm": "matrix product", "convolution": "convolution", "attention": "attention"}
CARD = types.SimpleNamespace(  # an H200, as far as the compiler asks
    **{"name": "H200", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 141 * 10**9},
    **{"max_threads_per_multi_processor": 2048, "regs_per_multiprocessor": 65536, "warp_size": 32},
    **{"shared_memory_per_block": 48 * 2**10, "shared_memory_per_block_optin": 227 * 2**10},
    **{"shared_memory_per_multiprocessor": 228 * 2**10, "L2_cache_size": 50 * 2**20, "gcnArchName": ""},
)


@dataclass
class Pass:
    """One kernel: the bytes of each array that it reads and writes, and the lines of this project that it computes."""

    kind: str
    reads: dict[str, int]
    writes: dict[str, int]
    lines: list[str]

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


class EndOfScheduling(Exception):
    """The list of kernels is complete."""


@contextlib.contextmanager
def pretended_card():
    """Within, the compiler takes this machine for one with a `CARD`."""
    cuda = get_interface_for_device("cuda")
    answers = {
        torch.cuda: {"current_device": 0, "device_count": 1, "get_device_capability": (9, 0)},
        cuda: {"is_available": True, "current_device": 0, "get_compute_capability": 90, "is_bf16_supported": True},
        cuda.Worker: {},
        scheduler: {"has_triton": True},
    }
    for owner in (torch.cuda, cuda, cuda.Worker):
        answers[owner]["get_device_properties"] = CARD
    with contextlib.ExitStack() as stack:
        for owner, values in answers.items():
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, lambda *args, _value=value, **kwargs: _value))
        yield


def count(network, inputs, dtype, training):
    """{"forward": passes, "backward": passes} (list[Pass] each; backward in training only) of one call of a network.

    Args:
        network: a function of `inputs`, built and to be called within FakeTensorMode; returns a tuple of tensors.
        dtype: of matrix products: autocast's, or float32.
    """
    found = []

    def compile_to_module(lowering):
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        found.append([made for node in lowering.scheduler.nodes if (made := describe(lowering, node))])
        raise EndOfScheduling

    def inner_compile(module, arguments, **kwargs):
        """In place of the compiler's own: the graph goes to the card; what is returned gives empty tensors."""
        returned = module.graph.output_node().args[0]
        outputs = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in returned]
        with detect_fake_mode(arguments):
            for node in module.graph.nodes:
                if "val" in node.meta:
                    node.meta["val"] = on_card(node.meta["val"])
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            arguments = on_card(list(arguments))
        try:
            compile_fx.compile_fx_inner(module, arguments, **kwargs)
        except InductorError as error:
            if not isinstance(error.inner_exception, EndOfScheduling):
                raise

        def call(arguments):
            return [like(value) if isinstance(value, torch.Tensor) else value for value in outputs]

        call._boxed_call = True
        return call

    def backend(module, arguments):
        return compile_fx.compile_fx(module, arguments, inner_compile=inner_compile)

    with (
        pretended_card(),
        mock.patch.object(graph.GraphLowering, "compile_to_module", compile_to_module),
        mock.patch.object(depthwise, "as_one_operation", lambda x: True),  # these would ask for the device
        mock.patch.object(dimr, "attention", F.scaled_dot_product_attention),
        mock.patch.object(dimr, "wants_full_heads", lambda z: torch.compiler.is_compiling()),
        config.patch(fx_graph_cache=False),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        torch.set_grad_enabled(training),
    ):
        torch._dynamo.reset()
        outputs = torch.compile(network, fullgraph=True, dynamic=False, backend=backend)(*inputs)
        if training:
            sum(output.float().mean() for output in outputs).backward()
    return dict(zip(("forward", "backward"), found, strict=False))


def like(value, device="cpu"):
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def on_card(value):
    """A tensor without storage, or a sequence of such, as one on the card."""
    if isinstance(value, torch.Tensor):
        return like(value, "cuda")
    return type(value)(map(on_card, value)) if isinstance(value, (tuple, list)) else value


def describe(lowering, node):
    """A kernel of the compiler's list as a `Pass`; None for what is no kernel."""
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        called = str(getattr(node.node, "python_kernel_name", None) or getattr(node.node, "op_overload", None))
        kind = next((kind for word, kind in LIBRARY_CALLS.items() if word in called), None)
        kind = kind or ("depthwise kernel" if "dimr" in called else None)
        if kind is None:
            return None  # a part of a result, or a view
    elif isinstance(node, scheduler.NopKernelSchedulerNode):
        return None
    else:
        kind = "fused pass"
    parts, lines = node.get_nodes(), set()
    for part in parts:
        for origin in part.node.origins if part.node is not None else ():
            frames = re.findall(r'File "([^"]+)", line (\d+)', origin.meta.get("stack_trace") or "")
            own = [f"{Path(file).stem}:{line}" for file, line in frames if Path(file).parent == ROOT / "libs"]
            lines.update(own[-1:])
    inside = {name for part in parts for name in part.get_buffer_names()}
    users = {name: {user.node for user in lowering.scheduler.name_to_buf[name].users} for name in inside}
    lasting = {name for name in inside if users[name] - set(parts)}
    reads, writes = collections.Counter(), collections.Counter()
    for part in parts:
        elements = 10**15
        if isinstance(part, scheduler.SchedulerNode):
            elements = 1
            for size in (*part.get_ranges()[0], *part.get_ranges()[1]):
                elements *= int(size)
        for dependencies, kept in ((part.read_writes.reads, reads), (part.read_writes.writes, writes)):
            for dependency in dependencies:
                name = dependency.name
                if name in inside and (kept is reads or name not in lasting):
                    continue  # made and used within
                kept[name] = max(kept[name], size_of(lowering, name, elements))
    for output in filter(None, getattr(node.node, "outputs", None) or ()):
        writes[output.get_name()] = size_of(lowering, output.get_name(), 10**15)
    return Pass(kind, named(lowering, reads), named(lowering, writes), sorted(lines))


def size_of(lowering, name, elements):
    """Bytes of an array of which no more than `elements` are touched; 0 if it has none."""
    value = lowering.try_get_buffer(name) or lowering.graph_inputs.get(name)
    try:
        return min(int(value.get_numel()), elements) * value.get_dtype().itemsize
    except (AttributeError, NotImplementedError, TypeError):
        return 0


def named(lowering, sizes):
    """{"buf1 64x257x960 bfloat16": bytes} for {"buf1": bytes}, without what has none."""
    result = {}
    for name, size in sizes.items():
        if size:
            value = lowering.try_get_buffer(name) or lowering.graph_inputs[name]
            shape = "x".join(map(str, value.get_size()))
            result[f"{name} {shape} {str(value.get_dtype()).removeprefix('torch.')}"] = size
    return result


def table(passes, largest):
    """The lines of a table of kinds, and the heaviest groups of alike fused passes."""
    kinds = collections.defaultdict(list)
    for made in passes:
        kinds[made.kind].append(made.bytes)
    for kind, sizes in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        yield kind, len(sizes), sum(sizes)
    groups = collections.defaultdict(list)
    for made in passes:
        if made.kind == "fused pass":
            groups[f"· {arrays(made.reads)} -> {arrays(made.writes)} ({' '.join(made.lines)})"].append(made.bytes)
    for alike, sizes in sorted(groups.items(), key=lambda item: -sum(item[1]))[:largest]:
        yield alike, len(sizes), sum(sizes)


def arrays(sizes):
    """Shapes and types of what is at least a hundredth of all of them."""
    return ", ".join(name.split(" ", 1)[1] for name, size in sizes.items() if size * 100 > sum(sizes.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--task", choices=["train", "sample"], default="train")
    parser.add_argument("--triton", action="store_true", help="depthwise convolutions by libs/depthwise_kernels.py")
    parser.add_argument("--largest", type=int, default=0, help="also list so many groups of alike fused passes")
    args = parser.parse_args()
    settings = utils.load_config(args.config)
    begun = time.time()
    with FakeTensorMode():
        nnet = utils.build_network(settings).train(args.task == "train")
        if args.task == "sample":
            round_weights(nnet, args.precision)
        if args.triton:
            nnet.use_depthwise_kernel("triton")
        batch = torch.empty(args.batch, dtype=torch.long)
        times = torch.empty(args.batch if args.task == "train" else 1)
        inputs = torch.empty(args.batch, *settings.z_shape), times, batch
        passes = count(nnet.forward, inputs, DTYPES[args.precision], args.task == "train")
    print(
        f"`python benchmarks/passes.py {' '.join(sys.argv[1:])}`\n\nPython {platform.python_version()}, torch "
        f"{torch.__version__}; counted in {time.time() - begun:.0f} s.\n"
    )
    print("| pass | kernels | GB |\n|---|---|---|")
    for name, made in passes.items():
        print(f"| **{name}** | {len(made)} | {sum(one.bytes for one in made) / 1e9:.1f} |")
        for kind, number, size in table(made, args.largest):
            print(f"| {kind} | {number} | {size / 1e9:.1f} |")


if __name__ == "__main__":
    main()
