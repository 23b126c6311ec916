"""Console output of a run: plain lines for a log file, a progress bar for a terminal."""

from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

COLUMNS = {
    "loss": "loss {:.4f}",
    "loss_ce": "ce {:.4f}",
    "loss_mse": "mse {:.4f}",
    "val_loss": "held-out {:.4f}",
    "grad_norm": "grad {:.3f}",
    "lr": "lr {:.2e}",
    "seconds": "{:.2f} s",
    "data_wait": "data {:.2f} s",
    "tokens_per_s_per_gpu": "{:,.0f} tok/s/rank",
    "mfu_official": "mfu {:.1%}",
}
"""Format of the values shown of a record, in order; a record may lack some."""


def describe(record: Mapping[str, float | int]) -> str:
    """Return the shown values of a record on one line."""
    return "  ".join(form.format(record[name]) for name, form in COLUMNS.items() if name in record)


class StepLines:
    """A plain line every `every` steps, and one for the last step."""

    def __init__(self, total: int, every: int, step: int) -> None:
        """`step` is the last finished one of `total`."""
        self._total, self._every = total, every

    def show(self, record: Mapping[str, float | int]) -> None:
        """Show a finished step."""
        step = int(record["step"])
        if step % self._every == 0 or step == self._total:
            print(f"step {step:{len(str(self._total))}}/{self._total}  {describe(record)}", flush=True)

    def close(self) -> None:
        """Do nothing: no line is left open. Counterpart of `ProgressBar.close`."""


class ProgressBar:
    """A progress bar over all steps; its numbers change every `every` steps."""

    def __init__(self, total: int, every: int, step: int) -> None:
        """`step` is the last finished one of `total`."""
        self._every = every
        self._progress = Progress(
            MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn()
        )
        self._task = self._progress.add_task("", total=total, completed=step)
        self._progress.start()

    def show(self, record: Mapping[str, float | int]) -> None:
        """Show a finished step."""
        step = int(record["step"])
        fresh = describe(record) if step % self._every == 0 else None
        self._progress.update(self._task, completed=step, description=fresh)

    def close(self) -> None:
        """Stop drawing, so that the terminal works normally again; the bar stays visible."""
        self._progress.stop()
