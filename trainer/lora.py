"""Low-rank adapters by name on the linear layers of one frozen model, in PEFT's file format.

y = x W^T + s (x A^T) B^T with s = alpha / rank (Hu et al. 2021). PEFT computes the same; here the low-rank
product is added in place, forward and backward, without scaled and added copies of the activations, and any
number of adapters hang on one base, of which one or none is on.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

RANKS = (1, 8, 16, 32, 64)
"""The ranks vLLM has kernels for."""


class _LowRank(torch.autograd.Function):
    """x W^T + bias + s (x A^T) B^T, for a frozen W; products in W's dtype, everything else in x's and A's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)  # (N, in)
        low_a, low_b = a.to(weight.dtype), (b * scaling).to(weight.dtype)
        low = flat @ low_a.T  # (N, rank)
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        y.addmm_(low, low_b.T)
        ctx.save_for_backward(flat, low, weight, low_a, low_b)
        ctx.scaling, ctx.x_dtype, ctx.lora_dtype = scaling, x.dtype, a.dtype
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, low_a, low_b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1]).to(weight.dtype)  # (N, out)
        g_low = g @ low_b  # (N, rank)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).addmm_(g_low, low_a).to(ctx.x_dtype).view(*grad.shape[:-1], -1)
        da = (g_low.T @ flat).to(ctx.lora_dtype)
        db = (g.T @ low).to(ctx.lora_dtype) * ctx.scaling
        return dx, None, None, da, db, None


class LoRALinear(nn.Module):
    """A frozen linear layer with any number of adapters, of which `active` is on."""

    def __init__(self, base: nn.Linear, *, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()
        self.active: str | None = None
        self.merged: Tensor | None = None
        """(out, in) the weight with the active adapter added to it, while `Adapters.merged` lasts."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.base.weight, self.base.bias
        y: Tensor
        if self.merged is not None:
            y = functional.linear(x.to(weight.dtype), self.merged, bias).to(x.dtype)
        elif self.active is None:
            y = self.base(x.to(weight.dtype)).to(x.dtype)
        else:
            y = _LowRank.apply(x, weight, bias, self.lora_a[self.active], self.lora_b[self.active], self.scaling)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Take on the weight that the active adapter makes of the base's: one product a layer instead of three."""
        if self.active is not None:
            a, b = self.lora_a[self.active], self.lora_b[self.active]
            self.merged = torch.addmm(self.base.weight.to(a.dtype), b, a, alpha=self.scaling).to(self.base.weight.dtype)


class Adapters:
    """The adapters of one model: add, switch, copy, save, load."""

    def __init__(
        self, model: PreTrainedModel, *, rank: int, alpha: int, matmul_dtype: torch.dtype | None = None
    ) -> None:
        """Put a LoRALinear in the place of every linear layer but the output head.

        Args:
            matmul_dtype: what the layers' frozen weights are stored and multiplied in; theirs where None.

        Raises:
            ValueError: vLLM cannot serve the rank, or the model has no linear layer.
        """
        if rank not in RANKS:
            raise ValueError(f"LoRA rank {rank}: vLLM serves only {RANKS}")
        self.rank, self.alpha = rank, alpha
        self.layers: dict[str, LoRALinear] = {}
        head = model.get_output_embeddings()
        for parent_name, parent in list(model.named_modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear) and layer is not head:
                    wrapped = LoRALinear(layer.to(matmul_dtype), scaling=alpha / rank)
                    setattr(parent, name, wrapped)
                    self.layers[f"{parent_name}.{name}"] = wrapped
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no linear layer to put an adapter on")

    def add(self, name: str) -> None:
        """A new adapter that changes nothing yet: A uniform as in nn.Linear, B zero. Float32 or wider."""
        for layer in self.layers.values():
            weight = layer.base.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            a = torch.empty(self.rank, weight.shape[1], dtype=dtype, device=weight.device)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            layer.lora_a[name] = nn.Parameter(a)
            layer.lora_b[name] = nn.Parameter(a.new_zeros(weight.shape[0], self.rank))

    def __contains__(self, name: str) -> bool:
        return all(name in layer.lora_a for layer in self.layers.values())

    @contextmanager
    def on(self, name: str | None) -> Iterator[None]:
        """Inside, the model is the base under the adapter of this name, or the bare base."""
        if name is not None and name not in self:
            raise KeyError(f"no adapter {name!r} has been added")
        before = {layer: layer.active for layer in self.layers.values()}
        for layer in self.layers.values():
            layer.active = name
        try:
            yield
        finally:
            for layer, active in before.items():
                layer.active = active

    @contextmanager
    def merged(self, name: str | None) -> Iterator[None]:
        """As `on`, without gradients, and faster: the same model up to rounding. The adapter must not change inside."""
        with torch.no_grad(), self.on(name):
            for layer in self.layers.values():
                layer.merge()
            try:
                yield
            finally:
                for layer in self.layers.values():
                    layer.merged = None

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.lora_a[name], layer.lora_b[name])]

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of the adapter's weights under PEFT's names."""
        tensors = {}
        for path, layer in self.layers.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_a[name].detach().clone()
            tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_b[name].detach().clone()
        return tensors

    @torch.no_grad()
    def set_state(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Overwrite the adapter of this name, adding it where it is new.

        Raises:
            ValueError: the tensors are those of another model or another rank.
        """
        if name not in self:
            self.add(name)
        own = self.state(name)
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
            raise ValueError(
                f"adapter {name!r}: these weights belong to another model or another rank than {self.rank}"
            )
        for path, layer in self.layers.items():
            layer.lora_a[name].copy_(tensors[f"base_model.model.{path}.lora_A.weight"])
            layer.lora_b[name].copy_(tensors[f"base_model.model.{path}.lora_B.weight"])

    def save(self, name: str, folder: Path, *, base_model: str) -> None:
        """Write a folder that PEFT and vLLM load: adapter_config.json and adapter_model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
            target_modules=sorted({path.rpartition(".")[2] for path in self.layers}),
            base_model_name_or_path=base_model, inference_mode=True,
        )  # fmt: skip
        config.save_pretrained(str(folder))
        save_file(
            {k: v.contiguous().cpu() for k, v in self.state(name).items()},
            folder / "adapter_model.safetensors",
        )

    def load(self, name: str, folder: Path) -> None:
        """Read the folder that `save` wrote under any name. An adapter of a lower rank or another alpha does the same
        here as there: its B is scaled, and the ranks that it lacks are new ones, which change nothing yet.

        Raises:
            ValueError: the weights are those of another model or of a higher rank.
        """
        config = LoraConfig.from_pretrained(str(folder))
        scaling = (config.lora_alpha / config.r) / (self.alpha / self.rank)
        tensors = load_file(folder / "adapter_model.safetensors")
        if config.r < self.rank:
            self.add(name)
            for key, new in self.state(name).items():
                dim = 0 if "lora_A" in key else 1
                if key in tensors:
                    missing = new.narrow(dim, config.r, self.rank - config.r)
                    tensors[key] = torch.cat([tensors[key].to(missing), missing], dim)
        self.set_state(name, {k: t * scaling if "lora_B" in k else t for k, t in tensors.items()})
