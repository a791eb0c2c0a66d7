"""Serve a local page that samples a class and shows what every branch predicts along the way.

    python -m pip install -r scripts/demo_requirements.txt
    python scripts/demo.py [--nnet_path WEIGHTS --config configs/NAME.py --autoencoder PATH] [--port 7860]

Without weights it takes the digits that scripts/quickstart.sh has trained. Sample j of the page is the picture that
scripts/sample.py makes of the same seed and settings as sample j of the first class in its list. The page is served to
this machine only (from another one: `ssh -L 7860:127.0.0.1:7860 MACHINE`) and asks nothing of any other.
"""

import contextlib
import html
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from absl import logging
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.launch import Parser, errors_in_one_line
from libs.model import Model
from scripts.sample import draw_samples, open_model, trajectory_sheet, with_settings

if TYPE_CHECKING:
    import gradio as gr

HOST = "127.0.0.1"

# Pictures may be a few pixels wide: enlarged without smoothing. Frames fit what is in them, in a narrow window too.
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
#samples img {image-rendering: pixelated}
#samples .grid-wrap {min-height: 0 !important}
#samples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
#sheet {padding-top: 30px !important}
"""


def class_choices(names: list[str]) -> list[tuple[str, int]]:
    """List what the page offers: (name and, where that is another, number; label), the null label last."""
    return [(n if n == str(label) else f"{n} ({label})", label) for label, n in enumerate([*names, "no class"])]


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

    settings, names, whole = model.config.sample, model.class_names, {"precision": 0, "min_width": 120}

    def draw(label: int, scale: float, steps: int, seed: int, n_samples: int) -> tuple[list, tuple]:
        with errors_in_page():
            sampled, labels = with_settings(model, seed, scale, steps), [label] * n_samples
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
            f"This one has {len(names)} classes and {len(model.nnet.stages)} branches."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                label = gr.Dropdown(class_choices(names), value=0, label="Class", info="type to search")
                with gr.Row():
                    scale = gr.Number(settings.scale, label="Guidance scale", info="1: none", step=0.5, min_width=120)
                    steps = gr.Number(settings.sample_steps, label="Steps", info="NFE", **whole)
                with gr.Row():
                    seed = gr.Number(model.config.seed, label="Seed", **whole)
                    n_samples = gr.Slider(1, 64, 8, step=1, label="Samples", min_width=120)
                button = gr.Button("Sample", variant="primary")
            with gr.Column(scale=5, min_width=320):
                # A label would lie on the first picture.
                shown = {"show_label": False, "columns": 4, "height": "auto", "object_fit": "contain", "buttons": []}
                samples = gr.Gallery(format="png", allow_preview=False, interactive=False, elem_id="samples", **shown)
        sheet = gr.Image(
            label="How a sample comes about", format="png", buttons=["download", "fullscreen"], elem_id="sheet"
        )
        gr.Markdown(
            "What each branch takes the picture to be, at its own resolution, while the noise goes from all (t = 1) to "
            "none (t = 0). The coarsest branch is on top; the finest is the one sampled with. Click another sample to "
            "see how that one comes about."
        )
        # One at a time, whoever asks: they share the network.
        alone = {"concurrency_id": "network", "concurrency_limit": 1}
        fields = [label, scale, steps, seed, n_samples]
        drawing = button.click(draw, fields, [samples, drawn], show_progress_on=samples, **alone)
        drawing.success(follow, drawn, sheet, **alone)
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
    parser = Parser(__doc__)
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
