"""What a notebook shows: curves while a run goes on, its page, and where a model is unsure.

    with live_curves("runs/demo"):
        midtrain.run(config, "runs/demo")

Only `live_curves` needs IPython, which every notebook has.
"""

import contextlib
import contextvars
import html
import tempfile
import threading
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.base.files import given_path, read_text
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.generation.text import token_texts
from refine_jax.report.metrics import METRICS_FILE, read_metrics
from refine_jax.report.plots import TRAINING_PLOT, plot_training


@contextlib.contextmanager
def live_curves(workdir: str | PathLike, *, seconds: float = 5.0) -> Iterator[None]:
    """Draw the curves of the run in `workdir` in the notebook while the block runs.

    They are drawn from `metrics.jsonl`, at most every `seconds` while it grows, and at the end.
    The block itself stays in the main thread, where the stop button of a notebook ends a run
    between two steps (`refine_jax.distributed`).
    """
    from IPython.display import HTML, Image, display

    metrics = given_path(workdir, "workdir") / METRICS_FILE
    shown = display(HTML("<i>The curves follow after the first step.</i>"), display_id=True)
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        plot = Path(folder) / TRAINING_PLOT

        def draw(drawn: int) -> int:
            """Draw the records if there are more than `drawn`; returns how many there are."""
            history = read_metrics(metrics)
            if len(history) > drawn:
                plot_training(plot, history, clip_norm=None)
                if plot.exists():
                    shown.update(Image(data=plot.read_bytes(), format="png"))
            return len(history)

        def follow() -> None:
            drawn = 0
            while not ended.wait(seconds):
                drawn = draw(drawn)

        # In the context of the cell, so that the updates count as its output.
        thread = threading.Thread(target=contextvars.copy_context().run, args=(follow,))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            draw(0)


def page_html(path: str | PathLike, *, height: int = 700) -> str:
    """A page of a run, such as WORKDIR/report.html, as HTML that a notebook shows in a frame.

    height: of the frame, in pixels. Raises DataError: there is no such page.
    """
    page = read_text(given_path(path, "the page"), DataError)
    style = f"width: 100%; height: {height}px; border: 1px solid #ccc"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}"></iframe>'


def entropy_html(
    tokenizer: Tokenizer,
    tokens: Sequence[int] | np.ndarray,
    entropy: Sequence[float] | np.ndarray,
    starts: Sequence[int] | np.ndarray = (),
    *,
    length: int = 1,
) -> str:
    """A text as HTML, each token the darker the less sure the model was before it.

    tokenizer: of the model. tokens: [T] ids. entropy: [T] nats, of the prediction at each token: of
    the token after it. starts: places of the first tokens of rollouts; the `length` tokens from
    there are framed. length: tokens of a rollout.
    """
    entropy = np.asarray(entropy, np.float64)
    shades = np.concatenate([[0.0], entropy[:-1] / max(entropy.max(), 1e-9)])
    framed = {start + offset for start in map(int, starts) for offset in range(length)}
    spans, texts = [], token_texts(tokenizer.decode, tokens)
    for place, (piece, shade) in enumerate(zip(texts, shades, strict=True)):
        nats = f' title="{entropy[place - 1]:.2f} nats"' if place else ""
        frame = "; border: solid #1f77b4; border-width: 2px 0" if place in framed else ""
        style = f"background: rgba(217, 99, 11, {0.8 * shade:.2f}){frame}"
        spans.append(f'<span{nats} style="{style}">{html.escape(piece)}</span>')
    text = "".join(spans)
    return f'<pre style="white-space: pre-wrap; line-height: 1.7">{text}</pre>'
