"""Translation of `Config` to the TransformerConfig that megatron-core's linears, schedules and optimizer read."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megabagel.config.schema import Config
from megabagel.parallel.megatron_timers import PhaseTimers
from megabagel.parallel.stage_activations import wire_width


def parameter_dtype(config: Config) -> torch.dtype:
    """Return the type of weights and activations; the optimizer keeps fp32 master weights beside bf16 ones."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def megatron_config(config: Config) -> TransformerConfig:
    """Return the TransformerConfig of a run. Layer shapes are not read from it; they come from `config.model`."""
    model, grid, dtype = config.model, config.parallel, parameter_dtype(config)
    return TransformerConfig(
        num_layers=max(model.layers, grid.pp * grid.vpp),
        # Not the model width: schedules allocate their receive buffers by hidden_size, and stages exchange wider rows
        # (`parallel.stage_activations`).
        hidden_size=wire_width(model, dtype, config.two_targets),
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn,
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
        context_parallel_size=grid.cp,
        sequence_parallel=grid.row_shards > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Under the interleaved schedule two stages exchange in both directions at once, and batched sends between one
        # pair of ranks would be mixed up. megatron-core refuses both settings together.
        overlap_p2p_comm=grid.vpp > 1,
        batch_p2p_comm=grid.vpp == 1,
        # True would make the host wait for the device after every batched send and receive, for a fault of old NCCL.
        batch_p2p_sync=False,
        # A stage's output is sent and then needed for its graph alone: 273 MB per micro-batch in flight at 7B. Not
        # under the interleaved schedule, whose sends are still under way then: gloo sent memory that was in use again,
        # and losses differed between ranks.
        deallocate_pipeline_outputs=grid.vpp == 1,
        bf16=dtype is torch.bfloat16,
        timers=PhaseTimers(),
        use_cpu_initialization=not torch.cuda.is_available(),
        # `model.init_weights` fills the weights, keyed by name.
        perform_initialization=False,
        # Makes VocabParallelEmbedding index its weight: F.embedding's backward is not deterministic on a GPU. On a CPU
        # it is.
        deterministic_mode=torch.cuda.is_available(),
        # Losses are already divided by global token counts, so megatron-core must sum gradients over data-parallel
        # ranks and micro-batches, not average them.
        calculate_per_token_loss=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gated_linear_unit=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
