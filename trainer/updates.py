"""One optimizer step over all processes: add up the gradients, clip, anneal, step.

Only adapters and heads train, so the gradients of a step are a few megabytes: they are summed explicitly,
once a step. Each process may therefore have a different number of microbatches, or none.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parameter import Parameter


class CannotLearn(Exception):
    """Training cannot go on; the message says why and what to do. The policy that serves is untouched."""


class Optimizer:
    """AdamW whose learning rate falls to 0 in a straight line; each group of parameters is clipped alone."""

    def __init__(
        self,
        groups: Sequence[Sequence[Parameter]],
        *,
        learning_rate: float,
        steps: int,
        accelerator: Accelerator,
        max_grad_norm: float = 1.0,
    ) -> None:
        """
        Args:
            groups: clipped one by one, so that a large gradient in one does not shrink the step of another.
            steps: how many steps there will be at most.
        """
        self._groups = groups
        self._accelerator = accelerator
        self._max_grad_norm = max_grad_norm
        parameters = [p for group in groups for p in group]
        self._adamw = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adamw, lambda step: max(0.0, 1 - step / steps))

    def step(self) -> list[float]:
        """Take one step with the gradients of all processes; return each group's norm before clipping.

        Raises:
            CannotLearn: a gradient is not a finite number.
        """
        self._add_up()
        norms = [float(torch.nn.utils.clip_grad_norm_(group, self._max_grad_norm)) for group in self._groups]
        if not all(map(torch.isfinite, torch.tensor(norms))):
            raise CannotLearn("a gradient is NaN or infinite: lower the learning rate")
        self._adamw.step()
        self._schedule.step()
        self._adamw.zero_grad(set_to_none=True)
        return norms

    def _add_up(self) -> None:
        if self._accelerator.num_processes == 1:
            return
        parameters = [p for group in self._groups for p in group]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self._accelerator.reduce(flat, reduction="sum")
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)


T = TypeVar("T")


def share(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """What this process does of a list that all processes know."""
    return list(items[accelerator.process_index :: accelerator.num_processes])


def total(value: Tensor, accelerator: Accelerator) -> float:
    """The sum of a number over all processes, wherever it lies."""
    if accelerator.num_processes == 1:
        return float(value)
    return float(accelerator.reduce(value.detach().to(accelerator.device), reduction="sum"))
