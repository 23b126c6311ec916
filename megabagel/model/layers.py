"""The Mixture-of-Transformers layer and its dense and MoE variants (BAGEL section 2.4; docs/bagel.md#layer-kinds).

Shape letters: docs/notation.md.

Hidden states lie as two contiguous blocks, one per expert: every projection is a dense GEMM, and nothing is gathered
or scattered inside a layer. Attention alone sees both blocks, one after the other.
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


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in fp32, cast to the input's type, then times weight (docs/bagel.md#layer)."""

    def __init__(self, width: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width] -> the same."""
        return self.kernels.norm(x, self.weight, self.eps)

    def of_sum(self, residual: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Twice [rows, width] -> (their sum, its norm)."""
        return self.kernels.add_norm(residual, x, self.weight, self.eps)


class Experts(nn.Module, Generic[M]):
    """The two experts' copies of one part of a layer; one copy serves both where the variant does not double it."""

    def __init__(self, make: Callable[[], M], doubled: bool) -> None:
        super().__init__()
        self.und: M = make()
        if doubled:
            self.gen: M = make()
        self.doubled = doubled

    def forward(self, und: torch.Tensor, gen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each expert's rows through its own copy."""
        return self.und(und), self.for_gen(gen)

    @property
    def for_gen(self) -> M:
        """The copy that serves latent tokens."""
        return self.gen if self.doubled else self.und


class Attention(nn.Module):
    """One expert's projections around the shared attention: q, k, v and the output; the weights of its QK-norm."""

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        super().__init__()
        head = config.kv_channels
        self.head, self.heads, self.kv_heads = head, config.heads // factory.shards, config.kv_heads // factory.shards
        blocks = {"q": config.heads * head, "k": config.kv_heads * head, "v": config.kv_heads * head}
        self.qkv = factory.column(config.hidden, blocks, bias=config.qkv_bias, rows_split=True)
        self.o = factory.row(config.heads * head, config.hidden, bias=False, rows_split=True)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = factory.partial_over_heads(RMSNorm(head, config.norm_eps, factory.kernels))
            self.k_norm = factory.partial_over_heads(RMSNorm(head, config.norm_eps, factory.kernels))

    def project(self, x_uD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's rows -> all rows' q [U, N, H], k and v [U, M, H], not yet normed."""
        return self.qkv(x_uD).unflatten(-1, (-1, self.head)).split([self.heads, self.kv_heads, self.kv_heads], 1)

    @property
    def q_gamma(self) -> torch.Tensor | None:
        """Weight [H] of the queries' norm; None without QK-norm."""
        return self.q_norm.weight if self.qk_norm else None

    @property
    def k_gamma(self) -> torch.Tensor | None:
        """Likewise of the keys'."""
        return self.k_norm.weight if self.qk_norm else None


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, recompute: bool) -> None:
        super().__init__()
        blocks = {"gate": config.ffn, "up": config.ffn}
        self.gate_up = factory.column(config.hidden, blocks, bias=False, rows_split=True)
        self.down = factory.row(config.ffn, config.hidden, bias=False, rows_split=True)
        self.swiglu = factory.kernels.swiglu
        if recompute and not factory.kernels.swiglu_keeps_input_alone:
            self.swiglu = partial(_recomputed, factory.kernels.swiglu)

    def forward(self, x_uD: torch.Tensor) -> torch.Tensor:
        """[u, D] -> [u, D]."""
        return self.down(self.swiglu(self.gate_up(x_uD)))


class Layer(nn.Module):
    """One decoder layer over [und | gen]: shared attention, then each expert's MLP, pre-norm with residuals."""

    def __init__(
        self, config: ModelConfig, factory: LayerFactory, recompute: str = "none", und_learns: bool = True
    ) -> None:
        super().__init__()
        mot, experts = config.variant == "mot", config.variant != "dense"
        self.recompute = recompute
        self.und_learns = und_learns
        self.qk_norm_rope = partial(factory.kernels.qk_norm_rope, eps=config.norm_eps)

        def norm() -> RMSNorm:
            return factory.partial_over_rows(RMSNorm(config.hidden, config.norm_eps, factory.kernels))

        self.input_norm = Experts(norm, doubled=mot)
        self.attention = Experts(lambda: Attention(config, factory), doubled=mot)
        self.mlp_norm = Experts(norm, doubled=mot)
        self.mlp = Experts(partial(Mlp, config, factory, recompute == "selective"), doubled=experts)

    def forward(
        self, und_uD: torch.Tensor, gen_gD: torch.Tensor, rope: Rope, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both experts' rows -> the same shapes."""
        if self.recompute == "full" and torch.is_grad_enabled():
            return _recomputed(self._forward, und_uD, gen_gD, rope, attend)
        return self._forward(und_uD, gen_gD, rope, attend)

    def _forward(
        self, und_uD: torch.Tensor, gen_gD: torch.Tensor, rope: Rope, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        und_uD = self._und(und_uD)
        normed_und, normed_gen = self.input_norm(und_uD, gen_gD)
        und, gen = self._attention(normed_und, normed_gen, rope, attend)
        und_uD, normed_und = self.mlp_norm.und.of_sum(und_uD, self._und(und))
        gen_gD, normed_gen = self.mlp_norm.for_gen.of_sum(gen_gD, gen)
        und, gen = self.mlp(normed_und, normed_gen)
        return und_uD + und, gen_gD + gen

    def _und(self, x: torch.Tensor) -> torch.Tensor:
        """The und stream; cut from the graph where it is frozen, since it carries what und rows read of gen rows."""
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
    """Run without keeping activations; nothing in a layer draws random numbers, so no generator state is kept."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
