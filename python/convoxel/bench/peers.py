"""Other engines that can serve a problem or a network, beside torch eager (from `pip install "convoxel[bench]"`).

    compile       torch.compile, every pass
    onnxruntime   forward, float32
    openvino      forward; bfloat16 as its own inference precision, between float32 inputs and outputs

All use torch's number of threads, and write into memory in use.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor, nn

from ..geometry import Problem
from . import onnx_model
from .extras import extra
from .operators import Step, Tensors, call, steps

Forward = Callable[[], Tensor]
MODULES = {"compile": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
PEERS = ("torch", *MODULES)
NO_BFLOAT16 = "--peers: onnxruntime computes no bfloat16 on a CPU; leave it out, or ask for --dtype f32"


def check(names: Iterable[str], isa: str | None) -> None:
    """ImportError for a peer that is not installed, ValueError for one that an instruction set does not cap."""
    for name in names:
        if name != "torch":
            extra(MODULES[name])
        if isa and name in ENGINES:
            raise ValueError(f"--peers: no setting caps {name} at --isa {isa}; leave one of them out")


def compiled(p: Problem, t: Tensors) -> dict[str, Step]:
    """torch.compile's passes; it needs a C++ compiler on the machine."""
    import torch._functorch.config as functorch

    torch.compiler.reset()
    # a gradient is taken again and again from one graph, whose saved tensors must not be given away
    with functorch.patch(donated_buffer=False):
        function = torch.compile(lambda *tensors: call(T, p, *tensors), dynamic=False)

        def compiling(_: Any, __: Problem, *tensors: Tensor | None) -> Tensor:
            return function(*tensors)

        return steps(T, p, t, compiling)


def onnxruntime(model: bytes, x: Tensor, y_shape: tuple[int, ...], dtype: str) -> Forward:
    """The model's forward pass; ValueError for bfloat16, which onnxruntime does not compute on a CPU."""
    ort = extra("onnxruntime")
    if dtype != "f32":
        raise ValueError(NO_BFLOAT16)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # leave the cores to the others
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    y = torch.empty(y_shape)
    binding = session.io_binding()
    for bind, tensor, of in (
        (binding.bind_input, x, session.get_inputs()),
        (binding.bind_output, y, session.get_outputs()),
    ):
        bind(of[0].name, "cpu", 0, extra("numpy").float32, tensor.shape, tensor.data_ptr())

    def forward() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    forward.keep = x  # type: ignore[attr-defined]  # bound by its address
    return forward


def openvino(model: bytes, x: Tensor, y_shape: tuple[int, ...], dtype: str) -> Forward:
    """The model's forward pass at the inference precision that `dtype` says: left alone, OpenVINO takes bfloat16
    where the CPU has it."""
    ov = extra("openvino")
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": dtype,
    }
    core = ov.Core()
    request = core.compile_model(core.read_model(model), "CPU", config).create_infer_request()
    y = torch.empty(y_shape)
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))

    def forward() -> Tensor:
        request.infer()
        return y

    return forward


ENGINES = {"onnxruntime": onnxruntime, "openvino": openvino}


def layer_of(engine: str) -> Callable[[Problem, Tensors], dict[str, Step]]:
    """The forward pass of a problem by an engine."""

    def passes(p: Problem, t: Tensors) -> dict[str, Step]:
        forward = ENGINES[engine](onnx_model.model(p, t), t.x.float(), p.y_shape, p.dtype)
        return {"forward": lambda: (forward(),)}

    return passes


LAYER_PEERS: dict[str, Callable[[Problem, Tensors], dict[str, Step]]] = {
    "compile": compiled,
    **{name: layer_of(name) for name in ENGINES},
}


def network_of(engine: str, network: nn.Module, x: Tensor, dtype: str) -> Forward:
    """The forward pass of a network by an engine, in evaluation mode, by way of ONNX."""
    extra("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(network.eval(), (x,), dynamo=True, verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export gave no model")
    model = program.model_proto
    y_shape = tuple(d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim)
    return ENGINES[engine](model.SerializeToString(), x, y_shape, dtype)
