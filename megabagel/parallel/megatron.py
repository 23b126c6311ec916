"""Our config in megatron-core's words: the one TransformerConfig that its linears, schedules and optimizer read."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megabagel.config.schema import Config
from megabagel.parallel.megatron_timers import PhaseTimers
from megabagel.parallel.stage_activations import wire_width


def parameter_dtype(config: Config) -> torch.dtype:
    """Type of weights and activations; the optimizer keeps fp32 beside bf16 weights."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def megatron_config(config: Config) -> TransformerConfig:
    """TransformerConfig for a run.

    `hidden_size` is the width of the wire between stages (the schedules size their buffers by it); layer shapes come
    from our own config. Losses arrive divided by global token counts, so gradients are summed, never averaged
    (`calculate_per_token_loss`).
    """
    model, grid, dtype = config.model, config.parallel, parameter_dtype(config)
    return TransformerConfig(
        num_layers=max(model.layers, grid.pp * grid.vpp),
        hidden_size=wire_width(model, dtype),
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
        # Interleaved, two stages exchange both directions at once: batched sends between one pair would be mixed up.
        overlap_p2p_comm=grid.vpp > 1,
        batch_p2p_comm=grid.vpp == 1,
        bf16=dtype is torch.bfloat16,
        timers=PhaseTimers(),
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        # Embeddings by indexing, whose gradient on a GPU has the same bits every time. A CPU's are so by themselves.
        deterministic_mode=torch.cuda.is_available(),
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
