"""The Mixture-of-Transformers layer and its dense and MoE variants (BAGEL section 2.4; docs/bagel.md#layer-kinds).

Shape letters: docs/notation.md.

Hidden states are two contiguous tensors, one per expert, so that every projection is a dense GEMM without gather or
scatter. Only attention runs on both together, und rows first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megabagel.config.schema import ModelConfig
from megabagel.model.factory import LayerFactory
from megabagel.model.inputs import Attend, Rope
from megabagel.model.kernels import Kernels

M = TypeVar("M", bound=nn.Module)
N = TypeVar("N", bound="RMSNorm")


class RMSNorm(nn.Module):
    """RMSNorm: fp32 statistics, cast to the input's type, then multiplied by the weight (docs/bagel.md#layer)."""

    def __init__(self, width: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize [T, W] along W."""
        return self.kernels.norm(x, self.weight, self.eps)


class SumRMSNorm(RMSNorm):
    """RMSNorm of a sum, which is returned, too: one kernel where the engine has it."""

    def forward(self, residual: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return (residual + x, its norm) of two [T, W] tensors."""
        return self.kernels.add_norm(residual, x, self.weight, self.eps)


class NormWeight(nn.Module):
    """Weight of a norm over heads that is computed inside another kernel, which takes the result of the call.

    A call, because with overlapped parameter gathering megatron-core waits for a weight in a forward hook of the module
    that owns it: a weight that is read without a call may be one of the step before.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self) -> torch.Tensor:
        """Return the weight [H]."""
        return self.weight


class Experts(nn.Module, Generic[M]):
    """Both experts' copies of one part of a layer; `und` serves both where the model variant does not double it."""

    def __init__(self, make: Callable[[], M], doubled: bool) -> None:
        super().__init__()
        self.und: M = make()
        if doubled:
            self.gen: M = make()
        self.doubled = doubled

    def forward(self, und: torch.Tensor, gen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply each expert's copy to its own rows."""
        return self.und(und), self.for_gen(gen)

    @property
    def for_gen(self) -> M:
        """The copy used for gen rows."""
        return self.gen if self.doubled else self.und


class Attention(nn.Module):
    """One expert's projections around the shared attention (q, k, v, output) and its QK-norm weights."""

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        super().__init__()
        head = config.kv_channels
        self.head, self.heads, self.kv_heads = head, config.heads // factory.shards, config.kv_heads // factory.shards
        blocks = {"q": config.heads * head, "k": config.kv_heads * head, "v": config.kv_heads * head}
        self.qkv = factory.column(config.hidden, blocks, bias=config.qkv_bias, rows_split=True)
        self.o = factory.row(config.heads * head, config.hidden, bias=False, rows_split=True)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = factory.partial_over_heads(NormWeight(head))
            self.k_norm = factory.partial_over_heads(NormWeight(head))

    def project(self, x_uD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project und or gen rows.

        Returns:
            (q [U, N, H], k [U, M, H], v [U, M, H]) before QK-norm, for all rows even if the input is split by sequence
            parallelism; U stands for G where the rows are gen rows.
        """
        return self.qkv(x_uD).unflatten(-1, (-1, self.head)).split([self.heads, self.kv_heads, self.kv_heads], 1)

    @property
    def q_gamma(self) -> torch.Tensor | None:
        """Weight [H] of the query norm; None without QK-norm."""
        return self.q_norm() if self.qk_norm else None

    @property
    def k_gamma(self) -> torch.Tensor | None:
        """Weight [H] of the key norm; None without QK-norm."""
        return self.k_norm() if self.qk_norm else None


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, recompute: bool) -> None:
        super().__init__()
        blocks = {"gate": config.ffn, "up": config.ffn}
        self.gate_up = factory.column(config.hidden, blocks, bias=False, rows_split=True)
        self.down = factory.row(config.ffn, config.hidden, bias=False, rows_split=True)
        self.swiglu = factory.kernels.swiglu
        # Triton's SwiGLU saves its input alone, so a recomputation around it would cost time and save nothing.
        if recompute and not factory.kernels.swiglu_keeps_input_alone:
            self.swiglu = partial(_recomputed, factory.kernels.swiglu)

    def forward(self, x_uD: torch.Tensor) -> torch.Tensor:
        """Apply the MLP to rows [u, D]; returns the same shape."""
        return self.down(self.swiglu(self.gate_up(x_uD)))


class Layer(nn.Module):
    """One pre-norm decoder layer over [und | gen] rows: shared attention, then each expert's MLP.

    Args:
        config: sizes and variant of the model.
        factory: builder of the linears.
        recompute: activation recomputation, `parallel.recompute`: "none", "selective" or "full".
        und_learns: False detaches the understanding stream inside the layer (`train.freeze` with "und").
    """

    def __init__(
        self, config: ModelConfig, factory: LayerFactory, recompute: str = "none", und_learns: bool = True
    ) -> None:
        super().__init__()
        mot, experts = config.variant == "mot", config.variant != "dense"
        self.recompute = recompute
        self.und_learns = und_learns
        self.qk_norm_rope = partial(factory.kernels.qk_norm_rope, eps=config.norm_eps)
        self.one_norm = factory.kernels.norms_heads_apart

        def norm(kind: type[N]) -> N:
            return factory.partial_over_rows(kind(config.hidden, config.norm_eps, factory.kernels))

        self.input_norm = Experts(partial(norm, RMSNorm), doubled=mot)
        self.attention = Experts(lambda: Attention(config, factory), doubled=mot)
        self.mlp_norm = Experts(partial(norm, SumRMSNorm), doubled=mot)
        self.mlp = Experts(partial(Mlp, config, factory, recompute == "selective"), doubled=experts)

    def forward(
        self, und_uD: torch.Tensor, gen_gD: torch.Tensor, rope: Rope, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer on both experts' rows.

        Args:
            und_uD: hidden states of this rank's und rows.
            gen_gD: hidden states of this rank's gen rows.
            rope: rotary tables of the [und | gen] rows.
            attend: attention under the mask of the batch.

        Returns:
            (und [u, D], gen [g, D]).
        """
        if self.recompute == "full" and torch.is_grad_enabled():
            return _recomputed(self._forward, und_uD, gen_gD, rope, attend)
        return self._forward(und_uD, gen_gD, rope, attend)

    def _forward(
        self, und_uD: torch.Tensor, gen_gD: torch.Tensor, rope: Rope, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(gen_gD) == 0 and not torch.is_grad_enabled():
            return self._und_alone(und_uD, rope, attend), gen_gD
        und_uD = self._und(und_uD)
        normed_und, normed_gen = self.input_norm(und_uD, gen_gD)
        und, gen = self._attention(normed_und, normed_gen, rope, attend)
        # Residual add and norm are one kernel here. The add at the end stays a plain add: its sum is what the next
        # layer, the next stage and recomputation take as input (docs/kernels.md#what-the-model-calls).
        und_uD, normed_und = self.mlp_norm.und(und_uD, self._und(und))
        gen_gD, normed_gen = self.mlp_norm.for_gen(gen_gD, gen)
        und, gen = self.mlp(normed_und, normed_gen)
        return und_uD + und, gen_gD + gen

    def _und_alone(self, und_uD: torch.Tensor, rope: Rope, attend: Attend) -> torch.Tensor:
        """Run the layer without gen rows, as in decoding, where calls on no rows would double the cost of a token."""
        und = self.attention.und
        q, k, v_TMH = und.project(self.input_norm.und(und_uD))
        if self.one_norm and und.qk_norm:
            # Queries and keys in one call, with a weight per head: the same bits.
            gamma_NH = torch.cat([und.q_norm().expand(und.heads, -1), und.k_norm().expand(und.kv_heads, -1)])
            qk = torch.cat([q, k], 1)
            q_TNH, k_TMH = self.qk_norm_rope(qk, qk[:0], gamma_NH, gamma_NH, rope=rope).split(
                [q.shape[1], k.shape[1]], 1
            )
        else:
            q_TNH = self.qk_norm_rope(q, q[:0], und.q_gamma, und.q_gamma, rope=rope)
            k_TMH = self.qk_norm_rope(k, k[:0], und.k_gamma, und.k_gamma, rope=rope)
        und_uD, normed = self.mlp_norm.und(und_uD, und.o(attend(q_TNH, k_TMH, v_TMH).flatten(1)))
        return und_uD + self.mlp.und(normed)

    def _und(self, x: torch.Tensor) -> torch.Tensor:
        """Return the und rows, detached where the understanding stream is frozen."""
        # Frozen weights alone would not stop gradients: und rows may attend to clean gen rows, so a loss on und rows
        # would still reach generation weights through the und stream.
        return x if self.und_learns else x.detach()

    def _attention(
        self, und_uD: torch.Tensor, gen_gD: torch.Tensor, rope: Rope, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_und, of_gen = self.attention.und, self.attention.for_gen
        q_und, k_und, v_und = of_und.project(und_uD)
        q_gen, k_gen, v_gen = of_gen.project(gen_gD)
        q_TNH = self.qk_norm_rope(q_und, q_gen, of_und.q_gamma, of_gen.q_gamma, rope=rope)
        k_TMH = self.qk_norm_rope(k_und, k_gen, of_und.k_gamma, of_gen.k_gamma, rope=rope)
        v_TMH = torch.cat([v_und, v_gen])
        run = partial(_recomputed, attend) if self.recompute == "selective" else attend
        out_TW = run(q_TNH, k_TMH, v_TMH).flatten(1)
        out_und, out_gen = out_TW.split([len(q_und), len(q_gen)])
        return of_und.o(out_und), of_gen.o(out_gen)


def _recomputed(function: Callable[..., Any], *args: object) -> Any:
    """Run `function` under activation checkpointing."""
    # Layers draw no random numbers, so saving the generator state would only cost time.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
