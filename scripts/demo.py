"""Serve a local page that samples a class and shows what every branch predicts along the way.

    python -m pip install -r scripts/demo_requirements.txt
    python scripts/demo.py [--nnet_path WEIGHTS --config configs/NAME.py --autoencoder PATH] [--port 7860]

Without weights it takes the digits that scripts/quickstart.sh has trained. Sample j of the page is the picture that
scripts/sample.py makes of the same seed and settings as sample j of the first class in its list. The page is served to
this machine only (from another one: `ssh -L 7860:127.0.0.1:7860 MACHINE`) and asks nothing of any other.
"""

import argparse
import contextlib
import html
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from absl import logging
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.class_names import class_label, find_classes
from libs.launch import errors_in_one_line
from libs.model import Model
from scripts.sample import class_caption, draw_samples, open_model, trajectory_sheet, with_settings

if TYPE_CHECKING:
    import gradio as gr

HOST = "127.0.0.1"
MOST_OFFERED = 12  # classes that a search offers
MOST_SAMPLES = 64
MOST_STEPS = 1000
MOST_SEED = 2**53 - 1  # the largest whole number that a browser writes exactly

# Pictures may be a few pixels wide: enlarged without smoothing. Frames fit what is in them, in a narrow window too.
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
#samples img {image-rendering: pixelated}
#samples .grid-wrap {min-height: 0 !important}
#samples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
#sheet {padding-top: 30px !important}
#classes .wrap {max-height: 15em; overflow-y: auto}
"""


def offered(word: str, names: Sequence[str]) -> list[int]:
    """Return labels that a search offers, likeliest first; the null label is found as "no class"."""
    return find_classes(word, [*names, class_caption(len(names), names)])[:MOST_OFFERED]


def caption(label: int, names: Sequence[str]) -> str:
    """Write a class as the page does: its name and, where that is another, its number."""
    name = [*names, class_caption(len(names), names)][label]
    return name if name == str(label) else f"{name} ({label})"


def chosen(word: str, marked: int | None, names: Sequence[str]) -> int:
    """Return the label marked among those that `word` offers, or else the first of them."""
    found = offered(word, names)
    if marked in found:
        return marked
    return found[0] if found else class_label(word, names)  # which says what comes close


def whole(value: object, name: str, least: int, most: int) -> int:
    """Return a field's whole number. Raises UserError, naming the field, for anything else."""
    if not isinstance(value, Real) or not float(value).is_integer() or not least <= value <= most:
        found = "nothing" if value is None else repr(value)
        raise UserError(f"the {name} must be a whole number from {least} to {most}; found {found}")
    return int(value)


def checked(
    model: Model, word: str, marked: int | None, seed: object, scale: object, steps: object, n_samples: object
) -> tuple[Model, list[int]]:
    """Turn the page's fields into the model with these settings, and a label for each sample."""
    label = chosen(word, marked, model.class_names)
    n_samples = whole(n_samples, "number of samples", 1, MOST_SAMPLES)
    seed = whole(seed, "seed", 0, MOST_SEED)
    steps = whole(steps, "number of steps", 1, MOST_STEPS)
    if not isinstance(scale, Real):
        raise UserError("the guidance scale must be a number")
    return with_settings(model, seed, float(scale), steps), [label] * n_samples


@contextlib.contextmanager
def errors_in_page() -> Iterator[None]:
    """Show a user's mistake as one message in the page."""
    import gradio as gr

    try:
        yield
    except (UserError, OSError) as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None


def build_page(model: Model) -> "gr.Blocks":
    """Build the page: its fields, and the functions above behind them."""
    import gradio as gr

    settings, names, branches = model.config.sample, model.class_names, len(model.nnet.stages)

    def classes(word: str) -> gr.Radio:
        found = offered(word, names)
        total = len(find_classes(word, names))
        label = "Class" if total <= MOST_OFFERED else f"Class: the first {MOST_OFFERED} of {total}"
        return gr.Radio(
            [(caption(i, names), i) for i in found],
            value=found[0] if found else None,
            label=label if found else "No such class",
            elem_id="classes",
        )

    def draw(*fields: object) -> tuple[list, tuple]:
        with errors_in_page():
            sampled, labels = checked(model, *fields)
            return list(draw_samples(sampled, labels)), (sampled.config, labels)

    def follow(drawn: tuple[ConfigDict, list[int]], index: int = 0) -> gr.Image:
        config, labels = drawn
        with errors_in_page():
            sheet = trajectory_sheet(replace(model, config=config), labels[:1], [index])
            return gr.Image(sheet, label=f"How sample {index + 1} comes about")

    def follow_clicked(drawn: tuple[ConfigDict, list[int]], event: gr.SelectData) -> gr.Image:
        return follow(drawn, event.index)

    with gr.Blocks(title="DiMR", analytics_enabled=False) as page:
        drawn = gr.State()
        gr.Markdown(
            "# DiMR\nA diffusion model that denoises at several resolutions at once. "
            f"This one has {len(names)} classes and {branches} branches."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                word = gr.Textbox(label="Search a class", placeholder="a number or a name", elem_id="word")
                marked = classes("")
                with gr.Row():
                    scale = gr.Number(settings.scale, label="Guidance scale", info="1: none", step=0.5, min_width=120)
                    steps = gr.Number(
                        settings.sample_steps, label="Steps", info="network evaluations", min_width=120, elem_id="steps"
                    )
                with gr.Row():
                    seed = gr.Number(model.config.seed, label="Seed", min_width=120, elem_id="seed")
                    n_samples = gr.Number(8, label="Samples", min_width=120)
                button = gr.Button("Sample", variant="primary")
            with gr.Column(scale=5, min_width=320):
                samples = gr.Gallery(
                    label="Samples",
                    show_label=False,  # it would lie on the first picture
                    columns=4,
                    format="png",
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    buttons=[],
                    interactive=False,
                    elem_id="samples",
                )
        sheet = gr.Image(
            label="How a sample comes about", format="png", buttons=["download", "fullscreen"], elem_id="sheet"
        )
        gr.Markdown(
            "What each branch takes the picture to be, at its own resolution, while the noise goes from all (t = 1) to "
            "none (t = 0). The coarsest branch is on top; the finest is the one sampled with. Click another sample to "
            "see how that one comes about."
        )
        word.change(classes, word, marked, show_progress="hidden", trigger_mode="always_last")
        # One at a time, whoever asks: they share the network.
        alone = {"concurrency_id": "network", "concurrency_limit": 1}
        gr.on(
            [button.click, word.submit],
            draw,
            [word, marked, seed, scale, steps, n_samples],
            [samples, drawn],
            show_progress_on=samples,
            **alone,
        ).success(follow, drawn, sheet, **alone)
        samples.select(follow_clicked, drawn, sheet, **alone)
    return page


def serve(model: Model, port: int) -> None:
    """Serve the page to this machine until it is stopped. Raises OSError for a port that is in use."""
    import gradio as gr

    # Fonts of the system: none is fetched. Its files go where no other user's are, and away at the end.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(model)
        options = {"share": False, "ssr_mode": False, "quiet": True, "footer_links": [], "prevent_thread_lock": True}
        try:
            page.launch(server_name=HOST, server_port=port, theme=theme, css=CSS, **options)
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} is in use or none: give another as --port") from error
        print(f"http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnet_path", help="weights, as of eval.py; the quickstart's newest unless given")
    parser.add_argument("--config", help="the config it was trained with; what is saved with the weights unless given")
    parser.add_argument("--autoencoder", help="file, folder or hub id; the config's unless given")
    parser.add_argument("--port", type=int, default=7860, help="of the page on this machine")
    arguments = parser.parse_args()
    logging.use_absl_handler()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no request leaves this machine
    if importlib.util.find_spec("gradio") is None:
        sys.exit("error: the page needs gradio: python -m pip install -r scripts/demo_requirements.txt")
    with errors_in_one_line():
        serve(open_model(arguments.nnet_path, arguments.config, arguments.autoencoder), arguments.port)


if __name__ == "__main__":
    main()
