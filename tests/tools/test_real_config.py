"""examples/configs/real.yaml on corpora as small as they can be: its paths and tasks fit what the builders write."""

from pathlib import Path

import build_stamps
import build_web_documents

from megabagel.config.load import load
from megabagel.data.builders.toy_shapes import write_shapes
from megabagel.data.plan.global_plan import open_sources
from megabagel.data.stats import count_steps
from megabagel.data.tokenize.tokenizer import load_tokenizer

REAL = Path(__file__).parents[2] / "examples" / "configs" / "real.yaml"


def test_the_mixture_has_every_kind_of_token(stamps: Path, pages: Path, tmp_path: Path) -> None:
    root = tmp_path / "real"
    assert build_stamps.main(["--stamps", str(stamps), "--out", str(root / "stamps")]) == 0
    assert build_web_documents.main(["--pages", str(pages), "--out", str(root / "documents")]) == 0
    write_shapes(root, samples=16, size=64, seed=0)
    settings = [f"data.root={root}", f"data.tokenizer={root / 'documents' / 'tokenizer.json'}", "data.builder=none"]
    config = load(REAL, settings)
    stats = count_steps(config, open_sources(config, load_tokenizer(config.data.tokenizer)), 3)
    assert all(source.samples for source in stats.sources.values())
    tokens = {name: source.tokens for name, source in stats.sources.items()}
    assert tokens["draw"].noised_latents and tokens["describe"].text_loss and tokens["describe"].vit
    documents = tokens["documents"]
    assert documents.text_loss and documents.vit and documents.clean_latents and documents.noised_latents
    assert tokens["texts"].text_loss and tokens["edits"].clean_latents and tokens["clips"].noised_latents


def test_the_header_names_the_commands_of_the_builders() -> None:
    header = REAL.read_text().partition("run:")[0]
    for tool in (build_stamps, build_web_documents):
        assert f"python tools/{Path(tool.__file__).name} --out runs/real/" in header
