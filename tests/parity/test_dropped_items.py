"""Dropped items: the sequence plan of a small batch packed by hand, by the official rules."""

import json
from pathlib import Path

import torch

from tests.support import seeded_bugs
from tests.support.parity_command import TEXT_ONLY, About, Entries, parity, written
from tests.support.parity_files import stem
from tests.support.rank_pool import RankPool

BOS, EOS, START, END = 244, 245, 246, 247


def item(kind: str, droppable: int, loss: int = 0) -> About:
    return {"type": kind, "enable_cfg": droppable, "loss": loss, "special_token_loss": 0}


SAMPLES = [
    {
        "sequence_plan": [
            item("vae_image", 1),  # dropped: 0.05 < 0.1; the counter moves to 1
            item("vit_image", 1),  # kept
            item("text", 1),  # dropped: 0.09 < 0.1; the counter stays
            item("text", 1),  # kept: 0.1 is not below 0.1
            item("vit_image", 1),  # dropped: 0.49 < 0.5; the counter moves on
            item("text", 0, loss=1),
            item("vae_image", 0, loss=1),
        ],
        "text_ids_list": [[5, 6], [7], [8, 9]],
        "image_shapes": [[3, 32, 16], [3, 28, 14], [3, 14, 14], [3, 16, 32]],
    },
    {
        "sequence_plan": [item("text", 1), item("text", 0, loss=1)],  # the first is dropped
        "text_ids_list": [[3], [4]],
        "image_shapes": [],
    },
]
DRAWS = [0.05, 0.6, 0.09, 0.1, 0.49, 0.02]
PROBABILITIES = {"text": 0.1, "vit": 0.5, "vae": 0.1}


def by_hand() -> Entries:
    """ViT image at 0 to 3, text 4 to 6, text with loss 7 to 10, noised image 11 to 14; second sample 15 to 17."""
    seen = torch.zeros(18, 18, dtype=torch.uint8)
    seen[:15, :15].tril_().add_(torch.ones(15, 15, dtype=torch.uint8).tril())
    seen[0:4, 0:4] = seen[11:15, 11:15] = 1
    seen[15:, 15:] = torch.ones(3, 3, dtype=torch.uint8).tril()
    integers = {
        "sequence_length": 18,
        "sample_lens": [15, 3, 6],
        "split_lens": [4, 3, 4, 4, 3, 6],
        "attn_modes": [1, 0, 0, 2, 0, 0],
        "packed_text_ids": [START, END, BOS, 7, EOS, BOS, 8, 9, EOS, START, END, BOS, 4, EOS],
        "packed_text_indexes": [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, 16, 17],
        "packed_position_ids": [1, 1, 1, 1, 2, 3, 4, 6, 7, 8, 9, 10, 10, 10, 10, 0, 1, 2],
        "packed_label_ids": [8, 9, EOS, 4, EOS],
        "ce_loss_indexes": [7, 8, 9, 15, 16],
        "packed_vit_token_indexes": [1, 2],
        "packed_vit_position_ids": [0, 10],
        "vit_token_seqlens": [2],
        "patchified_vae_latent_shapes": [[1, 2]],
        "packed_vae_token_indexes": [12, 13],
        "packed_latent_position_ids": [0, 1],
        "mse_loss_indexes": [12, 13],
    }
    return {f"batch/{name}": torch.tensor(values) for name, values in integers.items()} | {
        "batch/packed_vit_tokens": torch.ones(2, 588),
        "batch/padded_latent": torch.ones(1, 16, 2, 4),
        "batch/packed_timesteps": torch.tensor([0.3, 0.3]),
        "batch/noise": torch.ones(2, 64),
        "expect/attn_allowed": seen,
    }


def test_a_dropped_item_leaves_no_tokens_and_a_dropped_image_moves_the_counter(ranks: RankPool, tmp_path: Path) -> None:
    config = json.loads(stem(TEXT_ONLY).with_suffix(".json").read_text())["config"]
    config |= {"visual_und": True, "visual_gen": True}
    about = {"config": config, "samples": SAMPLES, "dropout": PROBABILITIES, "dropout_draws": DRAWS}
    words = [written(tmp_path / "train_dropout", by_hand(), about), "--random-weights", "--time", "1"]
    outcome = ranks.run(1, parity, words)[0]
    assert (outcome.code, outcome.failed, outcome.err) == (0, [], "")
    planted = ranks.run(1, parity, words, seeded_bugs.dropped_images_leave_no_gap)[0]
    assert (planted.code, planted.failed) == (1, ["batch/packed_position_ids"])

    about["dropout_draws"] = [0.05, 0.6, 0.09, 0.09999, 0.49, 0.02]
    outcome = ranks.run(1, parity, [written(tmp_path / "train_other", by_hand(), about), "--random-weights"])[0]
    assert outcome.code == 2
    assert "train_other.safetensors: batch/packed_text_ids has 14 rows, but its samples make 11" in outcome.err
