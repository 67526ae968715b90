"""Other people's fused norms, where they can be imported: apex, and cuDNN's graph API.

Both are called as their own tests call them. Neither is needed: the import happens when a case is
built, and what a peer cannot do is told in its words or by the gate.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .registry import DTYPES, Case


def not_importable(package: str) -> str | None:
    """None where the package can be found, else that it cannot."""
    found = importlib.util.find_spec(package) is not None
    return None if found else f"not importable: no package {package}"


class ApexBatchNorm(nn.Module):
    """apex's persistent NHWC batch norm, whose axes are the memory's order: (N, H, W, C)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        module = importlib.import_module("apex.contrib.groupbn.batch_norm")
        self.norm = module.BatchNorm2d_NHWC(case.dims[1], fuse_relu=case.act == "relu")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rest = () if residual is None else (residual.permute(0, 2, 3, 1),)
        y: Tensor = self.norm(x.permute(0, 2, 3, 1), *rest)
        return y.permute(0, 3, 1, 2)


def apex(case: Case) -> nn.Module:
    """apex's module for the case."""
    if case.op.family == "batch_norm":
        return ApexBatchNorm(case)
    module = importlib.import_module("apex.contrib.group_norm")
    groups, channels = case.op.num_groups(case.dims), case.dims[1]
    norm: nn.Module = module.GroupNorm(groups, channels, act=case.act or "")
    return norm


def _cannot_import(name: str) -> str | None:
    """apex is often there without its compiled parts."""
    try:
        importlib.import_module(name)
    except ImportError as exception:
        return f"not importable: {exception}"
    return None


def apex_refuses(case: Case) -> str | None:
    """What apex does not take, or would hand to PyTorch, so that the row would not be its own."""
    if case.layout != "nhwc" or len(case.dims) != 4:
        return "apex takes NHWC images only"
    fusion = (case.act, case.residual)
    if case.op.family == "batch_norm":
        if case.dtype != "float16":
            return "apex's batch norm takes float16 only"
        if fusion not in ((None, False), ("relu", False), ("relu", True)):
            return "apex's batch norm fuses relu and residual+relu only"
        return _cannot_import("apex.contrib.groupbn.batch_norm")
    if case.dtype == "float64" or fusion not in ((None, False), ("silu", False)):
        return "apex's group norm takes no float64 and fuses silu only"
    if (reason := _cannot_import("apex.contrib.group_norm")) is not None:
        return reason
    module = importlib.import_module("apex.contrib.group_norm")
    channels = getattr(module.GroupNorm, "SUPPORTED_CHANNELS", (case.dims[1],))
    return (
        None if case.dims[1] in channels else "apex's group norm has no kernel for these channels"
    )


def cudnn_frontend_refuses(case: Case) -> str | None:
    if case.dtype == "float64" or len(case.dims) != 4:
        return "the graph is built for images and not for float64"
    known = ((None, False), ("relu", False), ("relu", True))
    return None if (case.act, case.residual) in known else "fuses relu and residual+relu only"


class _Graph:
    """A finished cuDNN graph and the tensors it is executed with, by name."""

    def __init__(self, cudnn: Any, handle: Any, dtype: torch.dtype) -> None:
        kinds = {
            torch.float16: cudnn.data_type.HALF,
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float32: cudnn.data_type.FLOAT,
        }
        self.cudnn, self.handle, self.kind = cudnn, handle, kinds[dtype]
        self.build = cudnn.pygraph(
            io_data_type=self.kind,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        self.names: dict[str, Any] = {}

    def inputs(self, **tensors: Tensor) -> tuple[Any, ...]:
        made = {name: self.build.tensor_like(tensor) for name, tensor in tensors.items()}
        self.names |= made
        return tuple(made.values())

    def output(self, name: str, tensor: Any, kind: Any = None) -> None:
        tensor.set_output(True)
        if kind is not None:
            tensor.set_data_type(kind)
        self.names[name] = tensor

    def finish(self) -> None:
        self.build.validate()
        self.build.build_operation_graph()
        modes = self.cudnn.heur_mode
        self.build.create_execution_plans([modes.A, modes.FALLBACK])
        self.build.check_support()
        self.build.build_plans()
        self.workspace_bytes = self.build.get_workspace_size()

    def run(self, device: torch.device, **tensors: Tensor) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self.cudnn.set_stream(handle=self.handle, stream=stream)
        workspace = torch.empty(self.workspace_bytes, device=device, dtype=torch.uint8)
        pack = {self.names[name]: tensor for name, tensor in tensors.items()}
        self.build.execute(pack, workspace, handle=self.handle)


class _Plan(NamedTuple):
    forward: _Graph
    backward: _Graph
    constants: dict[str, Tensor]
    # What the comparison that yields relu's mask compares with; as large as x, as cuDNN asks for.
    zeros: Tensor | None


class _CudnnNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        running: list[Tensor],
        plan: _Plan,
    ) -> Tensor:
        y = torch.empty_like(x)
        mean, inv_var = torch.empty_like(weight), torch.empty_like(weight)
        tensors = {"x": x, "scale": weight, "bias": bias, "y": y, "mean": mean, "inv_var": inv_var}
        tensors |= dict(zip(("mean_in", "var_in"), running, strict=True))
        tensors |= dict(zip(("mean_out", "var_out"), running, strict=True))
        mask = None
        if residual is not None and plan.zeros is not None:
            mask = torch.empty_like(x, dtype=torch.bool)
            tensors |= {"residual": residual, "zeros": plan.zeros, "mask": mask}
        plan.forward.run(x.device, **tensors, **plan.constants)
        ctx.save_for_backward(x, weight, bias, mean, inv_var, mask)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inv_var, mask = ctx.saved_tensors
        plan: _Plan = ctx.plan
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        tensors = {"x": x, "dy": dy, "scale": weight, "mean": mean, "inv_var": inv_var}
        tensors |= {"dx": dx, "dscale": dweight, "dbias": dbias}
        dresidual = None
        if mask is not None:
            dresidual = torch.empty_like(x)
            tensors |= {"mask": mask, "dresidual": dresidual}
        elif "bias" in plan.backward.names:
            tensors["bias"] = bias
        plan.backward.run(x.device, **tensors)
        return dx, dweight, dbias, dresidual, None, None


class CudnnFrontend(nn.Module):
    """Batch norm by cuDNN's graph API: alone, with relu, or with a residual and relu.

    Backward under relu alone recomputes its argument; with a residual it reads a mask, and there
    forward reads a tensor of zeros to compare with. Those are the graphs cuDNN documents.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        channels = case.dims[1]
        self.dtype, self.relu, self.added = DTYPES[case.dtype], case.act == "relu", case.residual
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.plan: _Plan | None = None

    def _vectors(self) -> tuple[Tensor, ...]:
        """weight, bias and running statistics as cuDNN wants a vector: (1, C, 1, 1)."""
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        return tuple(vector.view(1, -1, 1, 1) for vector in own)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.plan is None:
            self.plan = self._plan(x.detach())
        weight, bias, *running = self._vectors()
        y: Tensor = _CudnnNorm.apply(x, weight, bias, residual, running, self.plan)
        return y

    def _plan(self, x: Tensor) -> _Plan:
        cudnn = importlib.import_module("cudnn")
        handle, kinds = cudnn.create_handle(), cudnn.data_type
        one = torch.ones(1, 1, 1, 1)
        constants = {"epsilon": one * 1e-5, "momentum": one * 0.1}
        vector = self._vectors()[0].detach()
        zeros = torch.zeros_like(x) if self.added else None

        graph = _Graph(cudnn, handle, self.dtype)
        sizes = dict.fromkeys(("scale", "bias", "mean_in", "var_in"), vector)
        scale, bias, mean_in, var_in = graph.inputs(**sizes)
        source, epsilon, momentum = graph.inputs(x=x, **constants)
        y, *statistics = graph.build.batchnorm(
            name="norm",
            input=source,
            scale=scale,
            bias=bias,
            in_running_mean=mean_in,
            in_running_var=var_in,
            epsilon=epsilon,
            momentum=momentum,
        )
        if zeros is not None:
            added, compared = graph.inputs(residual=x, zeros=zeros)
            y = graph.build.relu(name="relu", input=graph.build.add(name="add", a=y, b=added))
            mask = graph.build.cmp_gt(name="mask", input=y, comparison=compared)
            graph.output("mask", mask, kinds.BOOLEAN)
        elif self.relu:
            y = graph.build.relu(name="relu", input=y)
        graph.output("y", y)
        for name, found in zip(("mean", "inv_var", "mean_out", "var_out"), statistics, strict=True):
            graph.output(name, found, kinds.FLOAT)
        graph.finish()
        return _Plan(graph, self._backward(cudnn, handle, x), constants, zeros)

    def _backward(self, cudnn: Any, handle: Any, x: Tensor) -> _Graph:
        graph = _Graph(cudnn, handle, self.dtype)
        vector = self._vectors()[0].detach()
        source, dy = graph.inputs(x=x, dy=x)
        scale, mean, inv_var = graph.inputs(scale=vector, mean=vector, inv_var=vector)
        if self.added:
            (mask,) = graph.inputs(mask=torch.empty_like(x, dtype=torch.bool))
            dy = graph.build.scale(name="drelu", input=dy, scale=mask)
            graph.output("dresidual", dy, graph.kind)
        elif self.relu:
            (bias,) = graph.inputs(bias=vector)
            z = graph.build.batchnorm_inference(
                input=source, mean=mean, inv_variance=inv_var, scale=scale, bias=bias
            )
            dy = graph.build.relu_backward(loss=dy, input=z)
            dy.set_data_type(graph.kind)
        dx, dscale, dbias = graph.build.batchnorm_backward(
            name="backward", grad=dy, input=source, scale=scale, mean=mean, inv_variance=inv_var
        )
        graph.output("dx", dx)
        graph.output("dscale", dscale, cudnn.data_type.FLOAT)
        graph.output("dbias", dbias, cudnn.data_type.FLOAT)
        graph.finish()
        return graph
