"""The model, whole or as one pipeline stage: input embedding, layers, heads (BAGEL section 2; docs/bagel.md#layer).

Shape letters: docs/notation.md. Layers are named by their index in the whole model, so that parameter names do not
depend on the pipeline split.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import nn

from megabagel.config.schema import Config, ModelConfig
from megabagel.model.factory import LayerFactory, SingleDevice
from megabagel.model.flow import TimeEmbedder
from megabagel.model.freezing import freeze_parameters
from megabagel.model.init_weights import initialize_weights
from megabagel.model.inputs import Hidden, LatentInputs, Outputs, StageInputs, VitInputs
from megabagel.model.layers import Experts, Layer, RMSNorm
from megabagel.model.positions import sincos_table
from megabagel.model.vit import Connector, Vit, splits


class Embed(nn.Module):
    """Input embedding: text tokens, ViT features and noised latent tokens to hidden states."""

    vit_table: torch.Tensor
    latent_table: torch.Tensor

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        super().__init__()
        self.config, self.factory = config, factory
        self.tokens = factory.embedding(config.vocab, config.hidden)
        # A ViT whose heads or MLP width do not divide by tp runs whole on every tensor-parallel rank. The frozen
        # position tables are computed, not trained, so they are buffers outside of checkpoints.
        if config.visual_und:
            self.vit = Vit(config.vit, factory if splits(config.vit, factory.shards) else SingleDevice())
            self.connector = Connector(config, factory)
            self.register_buffer("vit_table", sincos_table(config.hidden, config.vit.grid), persistent=False)
        if config.visual_gen:
            self.vae2llm = factory.partial_over_rows(nn.Linear(config.latent_dim, config.hidden))
            self.time_embedder = factory.partial_over_rows(TimeEmbedder(config.hidden))
            self.register_buffer("latent_table", sincos_table(config.hidden, config.latent_grid), persistent=False)

    def forward(self, inputs: StageInputs) -> Hidden:
        """Return the hidden states of this rank's rows, with flow targets and weights for the last stage."""
        # Rows without text look up id 0; the mask removes that embedding and its gradient.
        und_UD = self.tokens(inputs.word_U) * inputs.is_word_U[:, None]
        if inputs.vit is not None:
            und_UD = und_UD + self._images(inputs.vit)
        latents = inputs.latents
        assert latents is not None
        und_uD, gen_gD = self.factory.split_rows(und_UD), self._latents(latents, und_UD)
        return Hidden(und_uD, gen_gD, latents.target_gZ, latents.weight_g, latents.constraint)

    def _images(self, vit: VitInputs) -> torch.Tensor:
        """Return [U, D]: encoded patches on their rows, zeros elsewhere."""
        encoded = vit.collect(self.connector(self.vit(vit.patches, vit.grid, vit.attend)))
        encoded = encoded + self.vit_table[vit.grid_all].to(encoded.dtype)
        # The zero row is what index -1 (text, padding) reads. It is computed from `encoded`, not a constant, so that
        # the ViT stays in the autograd graph of a batch without images and its gradients are zeros instead of absent.
        nothing = encoded.sum(0, keepdim=True) * 0
        return torch.cat([encoded, nothing])[vit.row_U]

    def _latents(self, latents: LatentInputs, like: torch.Tensor) -> torch.Tensor:
        """Return [g, D]: latent tokens plus timestep embedding plus frozen position embedding."""
        # There are no gen rows at all in an inference step that only decodes text.
        if not self.config.visual_gen or len(latents.grid_g) == 0:
            return like.new_zeros(len(latents.grid_g), self.config.hidden)
        time_ID = self.time_embedder(latents.time_I)
        tokens_gD = self.vae2llm(latents.x_t_gZ.to(like.dtype))
        return tokens_gD + time_ID[latents.image_g] + self.latent_table[latents.grid_g].to(tokens_gD.dtype)


class Heads(nn.Module):
    """Final norms, `lm_head` with cross-entropy, velocity head `llm2vae` with flow loss."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, und_learns: bool) -> None:
        super().__init__()
        self.factory, self.und_learns = factory, und_learns
        self.norm = Experts(
            lambda: factory.partial_over_rows(RMSNorm(config.hidden, config.norm_eps, factory.kernels)),
            doubled=config.variant != "dense",
        )
        self.lm_head = factory.head(config.hidden, config.vocab)
        self.visual_gen = config.visual_gen
        if config.visual_gen:
            self.llm2vae = factory.partial_over_rows(nn.Linear(config.hidden, config.latent_dim))

    def forward(self, hidden: Hidden, inputs: StageInputs) -> Outputs:
        """Return the losses per row, not yet summed or divided by token counts."""
        und_uD, gen_gD = self.norm(hidden.und_uD, hidden.gen_gD)
        # freeze_und detaches after the final norm: `lm_head` goes on learning (docs/bagel.md#freezing).
        und_uD = und_uD if self.und_learns else und_uD.detach()
        ce_Q = self.lm_head(self.factory.join_rows(und_uD)[inputs.ce_row_Q], inputs.label_Q)
        if self.visual_gen:
            velocity_gZ = self.llm2vae(gen_gD)
        else:
            # Zeros that depend on gen_gD: the generation expert stays in the autograd graph.
            velocity_gZ = torch.zeros_like(hidden.target_gZ) + gen_gD[:, :1] * 0
        mse_g = self.factory.kernels.flow_loss(velocity_gZ, hidden.target_gZ, hidden.weight_g, hidden.constraint)
        return Outputs(ce_Q, mse_g, velocity_gZ)

    def logits(self, und_uD: torch.Tensor, row_Q: torch.Tensor) -> torch.Tensor:
        """Return fp32 next-token logits [Q, V] of rows `row_Q` of the und rows [u, D] after the last layer.

        For inference, as `velocity`: rows are not split over tensor-parallel ranks (`parallel.sp` false).
        """
        head: Callable[[torch.Tensor], torch.Tensor] = self.lm_head.logits  # type: ignore[assignment]
        return head(self.norm.und(und_uD[row_Q]))

    def velocity(self, gen_gD: torch.Tensor) -> torch.Tensor:
        """Return the velocity [g, Z] of gen rows [g, D]; [g, 0] for a model without `visual_gen`."""
        return self.llm2vae(self.norm.for_gen(gen_gD)) if self.visual_gen else gen_gD[:, :0]


class Bagel(nn.Module):
    """The whole model, or one pipeline stage: its layers, the input embedding if `first`, the heads if `last`.

    Args:
        config: a whole run's `Config` gives a usable model: its weights are those that a training run of this config
            starts from on any grid, in `train.precision`. A `ModelConfig` leaves the weights to the caller, who fills
            them by `initialize_weights` or from a checkpoint.
        factory: `SingleDevice()`, or megatron-core's linears (`parallel.linears`).
        layers: numbers of this stage's layers in the whole model; None: all.
        first: whether this stage embeds tokens and images.
        last: whether this stage computes losses.
        recompute: activation recomputation, `parallel.recompute`.
        freeze: parts whose weights do not learn, `train.freeze`; None: those of a `Config`, else none.
    """

    def __init__(
        self,
        config: Config | ModelConfig,
        factory: LayerFactory,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        recompute: str = "none",
        freeze: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        run = config if isinstance(config, Config) else None
        model = config.model if isinstance(config, Config) else config
        if freeze is None:
            freeze = run.train.freeze if run else ()
        layers = range(model.layers) if layers is None else layers
        self.und_learns = "und" not in freeze
        und_learns = self.und_learns or model.variant != "mot"
        if first:
            self.embed = Embed(model, factory)
        self.layers = nn.ModuleDict({str(index): Layer(model, factory, recompute, und_learns) for index in layers})
        if last:
            self.heads = Heads(model, factory, self.und_learns)
        self.first, self.last = first, last
        freeze_parameters(self, model, freeze)
        if run is not None:
            initialize_weights(self, model, run.train.seed)
            # Parameters only: `self.to(dtype)` would also round the frozen position tables, buffers that stay fp32.
            for parameter in self.parameters():
                parameter.data = parameter.data.to(torch.bfloat16 if run.train.precision == "bf16" else torch.float32)

    def forward(self, inputs: StageInputs, hidden: Hidden | None = None) -> Hidden | Outputs:
        """Run one micro-batch through this stage.

        Args:
            inputs: token ids, rotary tables, attention and images of the micro-batch.
            hidden: output of the previous stage; None for the first one.

        Returns:
            Hidden states for the next stage, or the losses per row if this is the last one.
        """
        hidden = self.through_layers(inputs, hidden)
        return self.heads(hidden, inputs) if self.last else hidden

    def through_layers(self, inputs: StageInputs, hidden: Hidden | None = None) -> Hidden:
        """Run `forward` without the heads; inference calls `Heads.logits` and `Heads.velocity` on the result."""
        if self.first:
            hidden = self.embed(inputs)
        assert hidden is not None
        # With freeze_und every variant detaches the understanding stream here, at the input of the first layer of each
        # stage; variant `mot` detaches inside its layers, too (docs/bagel.md#freezing).
        if not self.und_learns:
            hidden = replace(hidden, und_uD=hidden.und_uD.detach())
        und_uD, gen_gD = hidden.und_uD, hidden.gen_gD
        for number, layer in self.layers.items():
            und_uD, gen_gD = layer(und_uD, gen_gD, inputs.rope, inputs.attend(int(number)))
        return replace(hidden, und_uD=und_uD, gen_gD=gen_gD)
