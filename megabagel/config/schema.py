"""Schema of the configuration: one tree of frozen dataclasses, with default, meaning and unit of every field.

`load.py` reads YAML and overrides into this tree; `checks.py` checks numbers and the rules between fields. The classes
are frozen because a config is made once and then passed to all parts of a run.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """Folder of a run, its start, and its time limits."""

    dir: str = "runs/default"
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/."""
    resume: str = "auto"
    """`auto`: newest complete checkpoint under run.dir, else a fresh start; `none`: fresh; else a checkpoint folder."""
    init_from: str | None = None
    """Checkpoint (imported, or of an earlier stage) whose weights a fresh start takes; optimizer state is not read."""
    init_weights: Literal["trained", "ema"] = "trained"
    """Which weights of `init_from`: the trained ones or their moving average (as fine-tuning from ema.safetensors)."""
    start_timeout: float = 300.0
    """Seconds that ranks wait for each other at the start; then the job ends and names the absent ranks."""
    timeout: float = 600.0
    """Seconds without progress (a phase of a step, a checkpoint, the index at the start) after which the job ends and
    names the rank that the others wait for."""
    heartbeat_timeout: float = 60.0
    """Seconds without a heartbeat after which a rank counts as dead."""


@dataclass(frozen=True)
class VitConfig:
    """ViT (SigLIP layout, NaViT packing; BAGEL section 2.2): native resolution, full attention inside each image."""

    layers: int = 2
    hidden: int = 96
    heads: int = 4
    ffn: int = 256
    patch: int = 14
    """Pixels per patch side."""
    grid: int = 70
    """Cells per side of the position tables, hence most patches per side; patch (row, col) has id row * grid + col."""
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class VaeConfig:
    """Frozen image codec, whose latents the model generates."""

    codec: Literal["blocks", "flux"] = "blocks"
    """`blocks`: exact training-free block transform; `flux`: the FLUX autoencoder, weights from `path`."""
    path: str | None = None
    """`ae.safetensors` for codec `flux`."""
    channels: int = 16
    downsample: int = 8
    """Pixels per latent cell side."""
    width: int = 128
    """flux: channels of the first level."""
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """flux: channel multiplier per level; the last level is not downsampled."""
    res_blocks: int = 2
    """flux: residual blocks per level."""
    scale: float = 0.3611
    """flux: x_0 = scale * (z - shift)."""
    shift: float = 0.1159


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder-only Mixture-of-Transformers (BAGEL section 2; Qwen2.5 layout)."""

    variant: Literal["dense", "moe", "mot"] = "mot"
    """Weights of the generation expert: none, its MLP, or every weight of a layer (BAGEL section 2.4, figure 3)."""
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    """Default: hidden / heads."""
    ffn: int = 256
    vocab: int = 512
    """Rows of the token embedding; at least the number of token ids of the tokenizer."""
    qk_norm: bool = True
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    rope_base: float = 1e6
    rope_precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the rotary frequencies. bf16 reproduces FSDP's buffer cast in the released trainer, an error of up to
    1.15 rad of phase at position 1000 (docs/bagel.md#precision); its inference uses fp32. Angles are fp32 in both."""
    init_std: float = 0.02
    visual_und: bool = True
    """Build the ViT tower and connector."""
    visual_gen: bool = True
    """Build the modules of image generation: vae2llm, time embedder, llm2vae."""
    vit: VitConfig = field(default_factory=VitConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    latent_patch: int = 2
    """Latent cells per token side: one token covers latent_patch * vae.downsample pixels per side."""
    latent_grid: int = 64
    """Cells per side of the position table, hence most latent tokens per side; token (row, col) has id row *
    latent_grid + col."""
    interpolate_pos: bool = False
    """Stretch an image's grid ids over the whole position table instead of its top left corner
    (docs/bagel.md#position-tables)."""

    @property
    def kv_channels(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def latent_dim(self) -> int:
        """Numbers per latent token: channels * latent_patch**2 (64 in BAGEL)."""
        return self.vae.channels * self.latent_patch**2

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token side (16 in BAGEL)."""
        return self.latent_patch * self.vae.downsample


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel sizes and engines. Data-parallel size = world size / (tp * pp * cp)."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size."""
    vpp: int = 1
    """Model chunks per pipeline rank; above 1 the schedule is interleaved 1F1B."""
    cp: int = 1
    """Context-parallel size."""
    sp: bool = True
    """Sequence parallelism: norms, residuals and stage activations hold 1/tp of the rows. No effect when tp = 1."""
    chunk: int = 128
    """Rows of a row block, the unit in which rows are assigned to context-parallel ranks; each expert's rows are padded
    to a multiple of it."""
    layer_split: tuple[int, ...] | None = None
    """Layers of each of the pp * vpp stages; default: as even as possible."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none, those of attention and SwiGLU, or those of whole layers."""
    attention: Literal["auto", "host", "triton", "flex", "fa4"] = "auto"
    """Attention engine (docs/kernels.md#attention). `triton`: our kernels, for GPUs; `flex`: torch's FlexAttention,
    forward only on a CPU; `fa4`: FlashAttention-4 through FlexAttention, where installed; `host`: exact attention on
    the CPU. `auto`: host on a CPU, triton on a GPU that it has kernels for, else flex."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Engine of norms, RoPE, SwiGLU, noise and losses. `auto`: triton on a GPU that it has kernels for, else torch."""

    @property
    def row_shards(self) -> int:
        """Number of parts that each expert's rows are split into between linears: tp with sequence parallelism or 1."""
        return self.tp if self.sp else 1


@dataclass(frozen=True)
class SourceConfig:
    """One data source of the mixture: a set of shards, all of one task."""

    name: str = ""
    path: str = ""
    """Glob of shards (WebDataset tars, parquet, JSONL) or a folder of them, relative to data.root."""
    task: Literal["t2i", "i2t", "edit", "video", "text", "interleave", "reward", "reconstruct"] = "t2i"
    weight: float = 1.0
    """Samples are drawn from sources in proportion to their weights."""
    images: str = ""
    """Folder of the images that JSONL files name, relative to data.root; default: the folder of the first file."""


@dataclass(frozen=True)
class ResizeConfig:
    """Resize rule for ViT or VAE (docs/bagel.md#image-sizes): sides become multiples of the pixels per token side."""

    max_size: int = 1024
    """Upper bound of the longer side, pixels."""
    min_size: int = 512
    """Lower bound of the shorter side, pixels, unless the other two limits are in the way."""
    max_pixels: int = 14 * 14 * 9 * 1024
    """Upper bound of width * height."""


@dataclass(frozen=True)
class DataConfig:
    """Samples, packing and conditioning dropout."""

    root: str = "."
    """Folder that source paths are relative to."""
    index_dir: str | None = None
    """Folder of cached shard indexes; default: `.index` beside the shards."""
    builder: Literal["none", "shapes", "scenes"] = "none"
    """Write a drawn data set under data.root on first use. `shapes`: one figure per page; `scenes`: one to four, with
    questions, edits of one among several and thoughts."""
    sources: tuple[SourceConfig, ...] = ()
    val_sources: tuple[SourceConfig, ...] = ()
    """Sources of the held-out set, for `train.val_every` and `megabagel evaluate loss`; never trained on."""
    tokenizer: str = "bytes"
    """`bytes`, a `tokenizer.json` (or a folder holding one), or a sentencepiece `*.model`."""
    min_tokens: int = 448
    """A pack is closed once it holds this many tokens."""
    max_tokens: int = 512
    """A pack never holds more tokens."""
    max_sample_tokens: int | None = None
    """Longer samples are skipped and counted; default: max_tokens."""
    lookahead: int = 64
    """Window of samples that the packer chooses from; the oldest is always taken, so that none is lost."""
    drop_text: float = 0.1
    drop_vit: float = 0.5
    drop_latent: float = 0.1
    """Conditioning dropout: probability of leaving out a droppable item, by kind (BAGEL section 2.3)."""
    dropped_images_advance: bool = True
    """Whether a dropped image still advances the RoPE counter by one, as in the released trainer (its inference leaves
    no such gap; docs/bagel.md#rope, #contexts). Dropped text never does."""
    vae_resize: ResizeConfig = field(default_factory=ResizeConfig)
    vit_resize: ResizeConfig = field(default_factory=lambda: ResizeConfig(max_size=518, min_size=224))
    decode: Literal["auto", "host", "dali"] = "auto"
    """Image decoder. `host`: Pillow, the reference; `dali`: NVIDIA DALI, on the GPU if there is one and no `workers`,
    else on the CPU. `auto`: dali when training on a GPU with DALI installed, else host."""
    decode_threads: int = 1
    """CPU threads of the decoder, in every process that decodes."""
    latents: str | None = None
    """Latent cache written by `megabagel data latents`: codec moments of every image, read instead of decoding and
    encoding it."""
    prefetch: int = 2
    """Steps prepared ahead of training; bounds the memory that they take (docs/data.md)."""
    workers: int = 0
    """Processes per rank that build packs, beside one that plans them; 0: a background thread does both."""
    worker_timeout: float = 120.0
    """Seconds that training waits for a worker before a warning names the worker's current task."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimization, losses and handling of bad steps (BAGEL table 3; docs/bagel.md#optimizer, #losses)."""

    steps: int = 100
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    packs_per_step: int = 4
    """Packs of one optimizer step over all data-parallel ranks; each pack is one micro-batch of one replica."""
    lr: float = 1e-3
    min_lr: float = 1e-7
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 20
    """Steps of linear warm-up from 0."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0
    """Global L2 norm that gradients are clipped to."""
    ema: float = 0.9999
    """Decay of the averaged weights per step; 0: no averaged weights."""
    ce_weight: float = 0.25
    mse_weight: float = 1.0
    timestep_shift: float = 1.0
    timestep_precision: Literal["fp32", "bf16"] = "fp32"
    """Type in which timesteps are shifted. bf16 reproduces FSDP's casts in the released code: t then has 8 significant
    bits (docs/bagel.md#precision)."""
    loss_normalization: Literal["global_batch", "micro_step"] = "global_batch"
    """Denominator of the losses. `global_batch`: loss tokens of the whole step, so that a step does not depend on how
    its packs are spread over micro-batches and ranks. `micro_step`: as released, loss tokens of one micro-batch of all
    data-parallel ranks, then averaged over micro-batches (docs/bagel.md#losses); tokens weigh more in micro-batches
    with few of them, and the loss curve depends on the data-parallel size."""
    freeze: tuple[Literal["llm", "vit", "connector", "latent", "und"], ...] = ()
    """Weights that are not trained (docs/bagel.md#freezing). `llm`: language model with embedding and head, both
    experts (freeze_llm). `vit`: the ViT (freeze_vit). `connector`: between ViT and language model. `latent`: vae2llm,
    time embedder, llm2vae. `und`: the understanding stream from embedding, ViT and connector to the final norm, so that
    only generation and lm_head learn (freeze_und). [llm, vit, latent] trains the connector alone. The VAE is always
    frozen."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Policy for a step whose loss or gradient is NaN or infinite (docs/faults.md). `stop`: end the run; `skip`: go on
    without the update; `rollback`: go on from the newest checkpoint with the data after this step."""
    on_spike: Literal["record", "stop", "skip", "rollback"] = "record"
    """Policy for a step whose loss or gradient norm is a spike. `record`: dump its samples and go on; the others are as
    above."""
    spike_sigma: float = 6.0
    """A spike is this many standard deviations above the mean of the `spike_window` steps before."""
    spike_window: int = 128
    """Steps of the statistics; no step is a spike before there are as many."""
    spike_warmup: int = 500
    """Steps at the start of a run in which no step is a spike: a fresh model's gradient norm is still irregular."""
    max_rollbacks: int = 3
    """Most rollbacks to one checkpoint; a further one ends the run."""
    val_every: int = 0
    """Steps between measurements of the held-out loss (docs/evaluation.md#held-out-loss); 0: none."""
    val_packs: int = 8
    """Packs of the held-out set, drawn once from `data.val_sources`; the same in every run, whatever its seed."""
    on_corruption: Literal["stop", "rollback"] = "stop"
    """Policy for copies of a weight that differ between ranks, compared before every checkpoint, and for a micro-batch
    whose recomputation differs (docs/faults.md). `stop`: end the run; `rollback`: go on from the newest checkpoint."""
    recompute_check_every: int = 0
    """Steps between checks that compute one micro-batch twice and compare losses and gradients bit for bit; 0: none."""


@dataclass(frozen=True)
class RewardConfig:
    """Weights of latent tokens in the flow loss for sources of task `reward` (SRUM section 3; docs/srum.md#weights)."""

    rule: Literal["code", "paper"] = "code"
    """Map from scores to pixels. `code`: as released, from 0 to 1 with 0.5 outside of all boxes, so that negative
    scores change nothing; `paper`: signed, 0 outside."""
    pooling: Literal["centre", "area"] = "centre"
    """From pixels to tokens. `centre`: interpolated at the token's centre, as released; `area`: mean of its pixels."""
    constraint: float = 0.5
    """lambda_c, weight of the plain flow loss (SRUM equation 3)."""
    floor: float | None = 0.0
    """Least weight of a token, reward and constraint together; null: none. Below 0 the loss of a token is unbounded
    below, which only rule `paper` can reach."""
    level: Literal["regions", "picture"] = "regions"
    """`picture`: one score for the whole picture instead of its regions (an ablation of SRUM, figure 3)."""
    binary: bool = False
    """Replace scores above 0 by 1 and all others by -1 (an ablation)."""
    use_layout: bool = True
    """Multiply by the layout score, scaled to [0, 1]; if false, alpha is 1 (an ablation)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 0
    """Steps between checkpoints; 0: only at the end of the run."""
    keep: int = 3
    """Number of newest complete checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are never deleted; 0: none."""
    async_save: bool = True
    """Copy the state to CPU memory and write it during the next steps; if false, training waits for the writing."""


@dataclass(frozen=True)
class SampleRequest:
    """An image file with a text: an edit or a question that training repeats as a sample."""

    image: str
    """Path of an image file."""
    text: str
    """Instruction or question."""


@dataclass(frozen=True)
class TelemetryConfig:
    """Console lines, metrics, sample images and MFU."""

    log_every: int = 1
    """Steps between console lines; metrics.jsonl has every step."""
    tensorboard: bool = True
    sample_every: int = 0
    """Steps between samples, made with the averaged weights where train.ema > 0; 0: none."""
    prompts: tuple[str, ...] = ()
    """Texts to draw."""
    edits: tuple[SampleRequest, ...] = ()
    """Images to edit."""
    questions: tuple[SampleRequest, ...] = ()
    """Questions to answer about images."""
    sample_size: tuple[int, int] = (64, 64)
    """Height and width of sample images, pixels."""
    sample_steps: int = 25
    """Euler steps per sample image."""
    sample_guidance: float = 1.0
    """Scale of classifier-free guidance on text; 1: none."""
    peak_tflops: float | None = None
    """Dense peak of one device, TFLOP/s, for MFU; default: a table of common GPUs, else measured by a GEMM at start."""
    straggler_steps: int = 50
    """Steps over which the ranks' own times are compared, to name a slow rank in the log; 0: never."""
    straggler_ratio: float = 1.2
    """A rank is named as slow if its own time exceeds this many times the median of its pipeline stage."""


@dataclass(frozen=True)
class Config:
    """Configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @property
    def two_targets(self) -> bool:
        """Whether stages exchange a second flow target: a source of task `reward` may have good and bad pictures."""
        return any(source.task == "reward" for source in self.data.sources)
