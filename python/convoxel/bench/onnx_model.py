"""One problem's forward pass as an ONNX model of one node, weights inside, for engines that read such models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..geometry import NORMS, POOLS, Problem
from .extras import extra
from .operators import Tensors

OPSET, IR = 21, 10  # GroupNormalization with a scale for each channel came with 21
NODES = {
    "conv": "Conv",
    "conv_transpose": "ConvTranspose",
    "linear": "Gemm",
    "batch_norm": "BatchNormalization",
    "instance_norm": "InstanceNormalization",
    "group_norm": "GroupNormalization",
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "max_pool": "MaxPool",
    "avg_pool": "AveragePool",
    "interpolate": "Resize",
}


def attributes(p: Problem) -> dict[str, Any]:
    """What the node says beside its tensors; batch_norm takes the statistics of x."""
    window = {"kernel_shape": p.f, "strides": p.s, "pads": (*p.p, *p.p)}
    if p.op in ("conv", "conv_transpose"):
        more = {"output_padding": p.o} if p.transposed else {}
        return {**window, "dilations": p.d, "group": p.g, **more}
    if p.op == "interpolate":
        how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        floor = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return floor if p.nearest else how
    others: dict[str, dict[str, Any]] = {
        "linear": {"transB": 1},
        "batch_norm": {"training_mode": 1},
        "group_norm": {"num_groups": p.g},
        "leaky_relu": {"alpha": 0.01},
        "max_pool": {**window, "dilations": p.d},
        "avg_pool": {**window, "count_include_pad": 1},
    }
    return others.get(p.op, {})


def initializers(p: Problem, t: Tensors) -> dict[str, Any]:
    """The node's inputs after x as arrays, in order; "" where one is left out."""
    numpy = extra("numpy")

    def array(value: Tensor | None) -> Any:
        return None if value is None else value.float().numpy()

    if p.op == "interpolate":
        return {"": None, "scales": numpy.array((1, 1, *p.s), numpy.float32)}
    if p.op in NORMS:
        ones, zeros = numpy.ones(p.c, numpy.float32), numpy.zeros(p.c, numpy.float32)
        w, b = (ones, zeros) if t.w is None else (array(t.w), array(t.b))
        return {"w": w, "b": b} | ({"mean": zeros, "var": ones} if p.op == "batch_norm" else {})
    if p.op in (*POOLS, "relu", "leaky_relu"):
        return {}
    return {"w": array(t.w)} | ({} if t.b is None else {"b": array(t.b)})


def model(p: Problem, t: Tensors) -> bytes:
    """The model: x in, y out, float32 whatever the problem's dtype."""
    onnx = extra("onnx")
    inputs = initializers(p, t)
    outputs = ["y", "mean_out", "var_out"] if p.op == "batch_norm" else ["y"]
    node = onnx.helper.make_node(NODES[p.op], ["x", *inputs], outputs, **attributes(p))
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        str(p),
        [onnx.helper.make_tensor_value_info("x", kind, p.x_shape)],
        [onnx.helper.make_tensor_value_info("y", kind, p.y_shape)],
        [onnx.numpy_helper.from_array(value, name) for name, value in inputs.items() if name],
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=IR).SerializeToString()
