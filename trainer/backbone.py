"""One frozen base model in memory, and as many adapters on it as there are roles.

The policy, the value model and the reward model are one base under different adapters; the reference is the
base with all of them off. The output head sees only the positions that predict response tokens, a few of
them at a time, so that no tensor over the whole vocabulary outlives a microbatch.

Not here: full fine-tuning, quantised bases, encoder-decoder models.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from trainer.encoding import Batch
from trainer.lora import Adapters

HEAD_ELEMENTS = 2**26
"""How many logits are computed at a time: 256 MB of float32."""


class Backbone:
    """A frozen causal language model that takes adapters by name."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rank: int = 16,
        alpha: int = 32,
        matmul_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            model: any decoder that AutoModelForCausalLM loads; it is taken over, not copied.
            matmul_dtype: what the linear layers multiply in; bfloat16 halves the time where the processor has
                it. The residual stream, attention, adapters and log-probabilities keep the model's dtype.

        Raises:
            ValueError: an adapter on this model could not be trained or served; the message says why.
        """
        # eval() for good: no dropout of the base is ever on, in training neither.
        self.base = model.eval().requires_grad_(False)
        self._decoder: nn.Module = model.get_decoder()
        self._head: nn.Linear = model.get_output_embeddings()
        text_config = model.config.get_text_config()
        self.hidden_size: int = text_config.hidden_size
        self.vocab_size: int = text_config.vocab_size
        self.layers: int = text_config.num_hidden_layers
        # What some architectures do to the logits after the head: Gemma, Cohere, Granite.
        self._softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self._logit_scale = getattr(text_config, "logit_scale", 1.0) / getattr(text_config, "logits_scaling", 1.0)
        self._check_logits()
        self.adapters = Adapters(model, rank=rank, alpha=alpha, matmul_dtype=matmul_dtype)

    @classmethod
    def load(cls, name_or_path: str | Path, *, rank: int = 16, alpha: int = 32, bf16: bool = True) -> "Backbone":
        """Read a model folder or a hub id onto the GPU if there is one.

        Args:
            bf16: on a GPU the whole model, on a CPU the matrix products, in bfloat16; float32 otherwise.
        """
        cuda = torch.cuda.is_available()
        dtype = torch.bfloat16 if cuda and bf16 else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
        device: Any = "cuda" if cuda else "cpu"  # transformers' annotation of `to` is not what it takes
        matmul_dtype = torch.bfloat16 if bf16 else None
        return cls(model.to(device), rank=rank, alpha=alpha, matmul_dtype=matmul_dtype)

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ids = self.base.generation_config.eos_token_id
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)

    def takes_masks(self, length: int) -> bool:
        """Whether rows of this many tokens may come with an attention mask of their own, (B, 1, T, T)."""
        config = self.base.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        return config._attn_implementation == "sdpa" and (window is None or length <= window)

    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, d) last hidden states under the adapter that is on."""
        states: Tensor = self._decoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        return states

    def before_responses(self, batch: Batch) -> Tensor:
        """(B, R, d) the hidden states that predict the response tokens."""
        states = self.hidden(batch)
        return states.gather(1, batch.columns[:, :, None].expand(-1, -1, states.shape[-1]))

    def response_means(self, batch: Batch) -> Tensor:
        """(B, K, d) the mean hidden state of each response in a row."""
        states = self.hidden(batch)
        column = torch.arange(states.shape[1], device=states.device)
        inside = (column >= batch.spans[:, :, :1]) & (column <= batch.spans[:, :, 1:])  # (B, K, T)
        return (inside / inside.sum(dim=2, keepdim=True)).to(states.dtype) @ states

    def next_hidden(self, ids: Tensor, attention: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """(B, d) last hidden states after the tokens `ids` (B, T) that follow what is in the cache.

        Args:
            attention: (B, cached + T), False on padding.
            positions: (B, T).
        """
        states = self._decoder(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return states[:, -1]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) logits of hidden states (..., d), in float32 or wider."""
        logits = self._head(hidden.to(self._head.weight.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self._logit_scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def logprobs(self, batch: Batch, *, temperature: float) -> Tensor:
        """(B, R) log-probabilities (nats) of the response tokens at this temperature; 0 in the padding."""
        hidden = self.before_responses(batch)[batch.mask]  # (N, d)
        rows = max(1, HEAD_ELEMENTS // self.vocab_size)
        parts = []
        for states, tokens in zip(hidden.split(rows), batch.response[batch.mask].split(rows), strict=True):
            if len(hidden) > rows and hidden.requires_grad:
                parts.append(checkpoint(self._token_logprobs, states, tokens, temperature, use_reentrant=False))
            else:
                parts.append(self._token_logprobs(states, tokens, temperature))
        logprobs = torch.cat(parts)
        return logprobs.new_zeros(batch.mask.shape).masked_scatter(batch.mask, logprobs)

    def _token_logprobs(self, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        logits = self.logits(hidden) / temperature
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)

    def publish(self, name: str, folder: Path) -> None:
        """Write the adapter as a folder that vLLM serves; heads are not part of it."""
        self.adapters.save(name, folder, base_model=self.base.name_or_path)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Architectures may treat logits in ways of their own: better to refuse one than to learn wrongly."""
        ids = torch.tensor([[1, 2, 3]], device=self.device)
        own = self.logits(self._decoder(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = self.base(input_ids=ids, use_cache=False).logits
        # The model scales and caps in its own dtype, and rounds each time.
        rounding = max(1e-3, 4 * torch.finfo(theirs.dtype).eps)
        if not torch.allclose(own, theirs.to(own.dtype), rtol=rounding, atol=1e-3):
            raise ValueError(f"{type(self.base).__name__} changes its logits in a way this trainer does not know")
