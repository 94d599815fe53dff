"""The page: what the studio can do as gradio's components; the HTTP API is made of the same functions."""

import functools
import html
import inspect
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from jdiff.app.studio import Job, Limits, Made, Studio
from jdiff.app.uploads import open_picture
from jdiff.diffusion import SCHEDULERS
from jdiff.pipelines import ClassPipeline, TextPipeline, save_png

OWN = "the model's own"
DEVICE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device"}
"""Of every event that makes pictures: they share one place in the queue."""
GALLERY: dict[str, Any] = {"format": "png", "interactive": False, "object_fit": "contain", "fit_columns": False}
MOST_HISTORY = 60


def make_page(studio: Studio) -> gr.Blocks:
    """The page of a studio, its queue set up; `launch` serves it."""
    with gr.Blocks(title=f"jdiff: {studio.name}", delete_cache=(3600, 86_400), analytics_enabled=False) as page:
        gr.Markdown(f"## {studio.name}")
        with gr.Row():
            left = gr.Column(scale=2)
            with gr.Column(scale=3):
                shown = gr.Gallery(label="Pictures", **GALLERY, columns=2, height=680, elem_id="pictures")
                status = gr.HTML(elem_id="status")
                stop = gr.Button("Stop", size="sm")
                facts = gr.JSON(label="What made them")
        with left:
            outputs = [shown, status, facts]
            if isinstance(studio.pipe, ClassPipeline):
                events = _by_label(studio, studio.pipe, outputs)
            else:
                events = _by_prompt(studio, studio.pipe, outputs)
        stop.click(None, cancels=events, api_visibility="private")
        _history(shown, facts, events)
    return page.queue(max_size=studio.limits.waiting)


def _by_prompt(studio: Studio, pipe: TextPipeline, outputs: list[Any]) -> list[Any]:
    """The controls of a model of texts; the events that make pictures."""
    limits = studio.limits
    unit, (high, wide) = pipe.geometry.downscale, pipe.geometry.default_size
    prompt = gr.Textbox("", label="Prompt", lines=2, placeholder="a red fox, (snow:1.2)", elem_id="prompt")
    negative = gr.Textbox("", label="Negative prompt", placeholder="what to lead away from")
    with gr.Tabs():
        if not pipe.geometry.repaints:
            with gr.Tab("From text"):
                from_text = gr.Button("Make", variant="primary", elem_id="from-text")
            with gr.Tab("From a picture"):
                picture = gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], elem_id="picture")
                strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="How much of it is made anew")
                from_picture = gr.Button("Make", variant="primary", elem_id="from-picture")
        with gr.Tab("Repaint"):
            brush = gr.Brush(colors=["#e6007e"], color_mode="fixed", default_size=max(4, wide // 20))  # a radius
            editor = gr.ImageEditor(
                label="Brush over what is to be made anew",
                type="pil",
                brush=brush,
                layers=False,
                transforms=(),
                sources=("upload", "clipboard"),
                elem_id="editor",
            )
            anew = gr.Slider(0.05, 1, 1, step=0.05, label="How much of what is brushed is made anew")
            repaint = gr.Button("Make", variant="primary", elem_id="repaint")
    with gr.Accordion("Settings"):
        steps = gr.Slider(1, limits.steps, min(30, limits.steps), step=1, label="Steps")
        guidance = gr.Slider(1, 20, 7.5, step=0.5, label="Guidance scale")
        scheduler = gr.Dropdown([OWN, *SCHEDULERS], value=OWN, label="Scheduler")
        with gr.Row():
            width = gr.Slider(unit, limits.side, min(wide, limits.side), step=unit, label="Width")
            height = gr.Slider(unit, limits.side, min(high, limits.side), step=unit, label="Height")
        seed, count, preview = _common(limits, "Pictures")
        gr.Markdown("A picture to begin with keeps its shape and gets the area of width x height.")
    files, scales = _lora()
    settings = [steps, guidance, scheduler, width, height, seed, count, files, scales, preview]

    def asked(
        steps: float,
        guidance: float,
        scheduler: str,
        width: float,
        height: float,
        seed: float,
        count: float,
        files: list[str] | None = None,
        scales: str = "",
        preview: float = 0,
    ) -> dict[str, Any]:
        return {
            "steps": whole(steps, "steps"),
            "guidance": guidance,
            "scheduler": None if scheduler == OWN else scheduler,
            "width": whole(width, "width"),
            "height": whole(height, "height"),
            **shared(seed, count, files, scales, preview),
        }

    def text_to_image(prompt: str, negative: str, *settings: Any) -> Job:
        return studio.from_prompt(prompt, negative, **asked(*settings))

    def image_to_image(prompt: str, negative: str, picture: str | None, strength: float, *settings: Any) -> Job:
        image = open_picture(picture)
        return studio.from_prompt(prompt, negative, image=image, strength=strength, **asked(*settings))

    def inpaint(prompt: str, negative: str, edited: dict[str, Any] | None, strength: float, *settings: Any) -> Job:
        image, mask = painted(edited)
        return studio.from_prompt(prompt, negative, image=image, mask=mask, strength=strength, **asked(*settings))

    texts, events = [prompt, negative], []
    make = functools.partial(gr.on, outputs=outputs, show_progress="minimal", **DEVICE)
    if not pipe.geometry.repaints:
        inputs = [*texts, *settings]
        events.append(
            make([from_text.click, prompt.submit], told(text_to_image, asked), inputs=inputs, api_name="text_to_image")
        )
        inputs = [*texts, picture, strength, *settings]
        events.append(make(from_picture.click, told(image_to_image, asked), inputs=inputs, api_name="image_to_image"))
    inputs = [*texts, editor, anew, *settings]
    return [*events, make(repaint.click, told(inpaint, asked), inputs=inputs, api_name="inpaint")]


def _by_label(studio: Studio, pipe: ClassPipeline, outputs: list[Any]) -> list[Any]:
    """The controls of a model of classes; the events that make pictures."""
    limits = studio.limits
    names = pipe.class_names or [str(label) for label in range(pipe.model.num_classes)]
    choices = [(f"{label} {name}" if name != str(label) else name, label) for label, name in enumerate(names)]
    labels = gr.Dropdown(choices, value=[0], multiselect=True, label="Classes", elem_id="classes")
    button = gr.Button("Make", variant="primary", elem_id="from-labels")
    with gr.Accordion("Settings"):
        steps = gr.Slider(1, limits.steps, min(50, limits.steps), step=1, label="Steps")
        guided = pipe.model.null_label is not None
        guidance = gr.Slider(1, 20 if guided else 1, 4 if guided else 1, step=0.5, label="Guidance scale")
        sampler = gr.Dropdown([OWN, *pipe.process.samplers], value=OWN, label="Sampler")
        seed, count, preview = _common(limits, "Pictures of each class")
    files, scales = _lora()

    def class_to_image(
        labels: list[int],
        steps: float,
        guidance: float,
        sampler: str,
        seed: float,
        count: float,
        files: list[str] | None = None,
        scales: str = "",
        preview: float = 0,
    ) -> Job:
        return studio.from_labels(
            labels,
            steps=whole(steps, "steps"),
            guidance=guidance,
            sampler=None if sampler == OWN else sampler,
            **shared(seed, count, files, scales, preview),
        )

    inputs = [labels, steps, guidance, sampler, seed, count, files, scales, preview]
    made = {"outputs": outputs, "show_progress": "minimal", **DEVICE}
    return [gr.on(button.click, told(class_to_image), inputs=inputs, api_name="class_to_image", **made)]


def shared(seed: float, count: float, files: list[str] | None, scales: str, preview: float) -> dict[str, Any]:
    """What any job takes, from its controls."""
    return {
        "seed": whole(seed, "seed"),
        "count": whole(count, "pictures"),
        "loras": [Path(file) for file in files or ()],
        "scales": scales,
        "preview_every": whole(preview, "previews"),
    }


def _common(limits: Limits, count_label: str) -> tuple[Any, Any, Any]:
    """The seed, how many pictures, and how often a preview."""
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", scale=3)
        dice = gr.Button("Another seed", size="sm", scale=1, min_width=120)
        dice.click(lambda: random.randrange(2**32), outputs=seed, queue=False, api_visibility="private")
    count = gr.Slider(1, limits.pictures, 1, step=1, label=count_label)
    preview = gr.Slider(0, 50, 5, step=1, label="Steps between two previews (0 for none)")
    return seed, count, preview


def _lora() -> tuple[Any, Any]:
    with gr.Accordion("LoRA", open=False):
        files = gr.File(label="safetensors", file_count="multiple", file_types=[".safetensors"], elem_id="loras")
        scales = gr.Textbox("", label="Strengths, by comma, in the files' order (1 when empty)", elem_id="scales")
    return files, scales


def _history(shown: Any, facts: Any, events: Sequence[Any]) -> None:
    """The pictures made on this page before; one that is chosen tells what made it."""
    history = gr.Gallery(label="History", **GALLERY, columns=10, height=260, elem_id="history")
    forget = gr.Button("Forget them", size="sm")
    private: dict[str, Any] = {"queue": False, "api_visibility": "private"}

    def keep(new: list[Any] | None, old: list[Any] | None) -> list[Any]:
        return [*(new or ()), *(old or ())][:MOST_HISTORY]

    def told_of(old: list[Any], chosen: gr.SelectData) -> Any:
        with Image.open(old[chosen.index][0]) as image:
            return json.loads(image.info.get("jdiff", "{}"))

    for event in events:
        event.success(keep, [shown, history], history, **private)
    history.select(told_of, history, facts, **private)
    forget.click(lambda: None, outputs=history, **private)


def told(ask: Callable[..., Job], settings: Callable[..., Any] | None = None) -> Callable[..., Iterator[Any]]:
    """A function that asks for a job as gradio's generator of (gallery, status, facts); a user's mistakes as messages.

    settings: whose parameters `ask` takes as its `*settings`; the API shows them by name.
    """

    @functools.wraps(ask)
    def run(*inputs: Any) -> Iterator[Any]:
        try:
            for news in ask(*inputs):
                if isinstance(news, Made):
                    yield from finished(news)
                else:
                    pictures = gr.skip() if news.pictures is None else [*news.pictures]
                    yield pictures, bar(news.done, news.total, news.seconds), gr.skip()
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            raise gr.Error(html.escape(str(error)), title="This cannot be done", print_exception=False) from error

    own = [one for one in inspect.signature(ask).parameters.values() if one.kind is not one.VAR_POSITIONAL]
    more = inspect.signature(settings).parameters.values() if settings else ()
    run.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    return run


def finished(made: Made) -> Iterator[Any]:
    """The pictures as PNGs that carry what made them; gradio takes copies."""
    with tempfile.TemporaryDirectory(prefix="jdiff-") as folder:
        paths = [Path(folder) / f"{i}.png" for i in range(len(made.pictures))]
        for picture, path, fact in zip(made.pictures, paths, made.facts, strict=True):
            save_png(picture, path, fact)
        captions = [f"seed {fact['seed']}, {fact['index']}: {subject(fact)}" for fact in made.facts]
        yield list(zip(map(str, paths), captions, strict=True)), "", made.facts


def subject(fact: Mapping[str, Any]) -> str:
    """What a picture was to show."""
    return str(next(fact[key] for key in ("prompt", "class", "labels") if key in fact))


def bar(done: int, total: int, seconds: float) -> str:
    """A progress bar with its rate and the time left."""
    left = seconds / done * (total - done)
    rate = f"{done / seconds:.2f} steps/s" if seconds > 0 else ""
    return f'<progress value="{done}" max="{total}" style="width:100%"></progress>step {done} of {total}, {rate}, {left:.0f} s left'


def whole(value: float | None, name: str) -> int:
    """A control's number as an int; ValueError for none and for a fraction."""
    if value is None or int(value) != value:
        raise ValueError(f"{name} must be a whole number, found {value}")
    return int(value)


def painted(edited: dict[str, Any] | None) -> tuple[Image.Image, Image.Image]:
    """(the editor's picture, what was brushed over as white of mode L); ValueError where there is no picture."""
    background = None if edited is None else edited["background"]
    if edited is None or background is None:
        raise ValueError("there is no picture: choose one to repaint")
    mask = Image.new("L", background.size)
    for layer in edited["layers"]:
        mask.paste(255, mask=layer.convert("RGBA").getchannel("A").point([0] + [255] * 255))
    return background.convert("RGB"), mask
